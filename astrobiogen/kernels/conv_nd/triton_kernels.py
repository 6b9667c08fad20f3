"""CUDA launchers of `conv_nd`, `conv_transpose_nd` and `conv_nd_weight_grad`, and their cases for the ahead-of-time
compile gate."""

import dataclasses
from collections.abc import Callable

import torch

from astrobiogen.kernels._case import CompileCase
from astrobiogen.kernels.conv_nd import reference
from astrobiogen.kernels.conv_nd.geometry import CIRCULAR, POLE, ZEROS, Geometry, add_halo, fold_halo
from astrobiogen.kernels.conv_nd.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.conv_nd.triton_launch import (
    LARGE_SHARED_TARGETS,
    Launch,
    Problem,
    adjoint_problem,
    forward_launch,
    weight_launch,
)


def conv_nd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    mode: list[int],
    dilation: list[int],
    groups: int,
    activation: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `conv_nd` on CUDA: y, and what went into the activation if `keep`. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_nd_op(x, weight, bias, stride, padding, mode, dilation, groups, activation, keep)
    geometry = Geometry.of(stride, padding, mode, dilation, groups)
    padded, geometry = _without(x, geometry, lambda axis: geometry.mode[axis] == POLE)
    kernel = weight.shape[2:]
    out = geometry.output_size(padded.shape[2:], kernel)
    y = x.new_empty(x.shape[0], *out, weight.shape[0])
    kept = torch.empty_like(y) if keep else x.new_empty(0)
    if y.numel() > 0:
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        problem = Problem.of(x.shape[0], padded.shape[2:], out, kernel, geometry, (inputs, outputs))
        packed = weight.reshape(groups, outputs, inputs, -1).permute(0, 3, 2, 1).contiguous()
        launch = forward_launch(
            problem,
            x.element_size(),
            _target(x),
            activation=activation,
            keep=keep,
            precision=_precision(x),
        )
        rows = padded.movedim(1, -1).contiguous()
        launch(x=rows, weight=packed, bias=_bias(bias, x, groups * outputs), y=y, kept=kept if keep else y)
    return y.movedim(-1, 1), kept.movedim(-1, 1) if keep else kept


def conv_transpose_nd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    mode: list[int],
    dilation: list[int],
    groups: int,
    size: list[int],
) -> torch.Tensor:
    """The op `conv_transpose_nd` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_transpose_nd_op(x, weight, bias, stride, padding, mode, dilation, groups, list(size))
    geometry = Geometry.of(stride, padding, mode, dilation, groups)
    # The adjoint of circular padding wraps inside the kernel where input and output positions are the same ones;
    # other halos are summed up
    # behind the kernel, from fp32.
    wraps = [kind == CIRCULAR and step == 1 and n == q for kind, step, n, q in zip(mode, stride, size, x.shape[2:])]
    folded = dataclasses.replace(geometry, mode=tuple(ZEROS if wrap else kind for wrap, kind in zip(wraps, mode)))
    inner = dataclasses.replace(folded.after_halo(), mode=tuple(CIRCULAR if wrap else ZEROS for wrap in wraps))
    padded = [n + 2 * halo for n, halo in zip(size, folded.halo)]
    folds = padded != list(size)
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    y = x.new_empty(x.shape[0], *padded, groups * outputs, dtype=torch.float32 if folds else x.dtype)
    if y.numel() > 0:
        problem = adjoint_problem(x.shape[0], x.shape[2:], padded, weight.shape[2:], inner, (inputs, outputs))
        packed = weight.reshape(groups, inputs, outputs, -1).permute(0, 3, 1, 2)
        packed = (packed if problem.transposed else packed.flip(1)).contiguous()
        launch = forward_launch(
            problem,
            x.element_size(),
            _target(x),
            activation=0,
            keep=False,
            precision=_precision(x),
        )
        rows = x.movedim(1, -1).contiguous()
        launch(x=rows, weight=packed, bias=_bias(None if folds else bias, x, groups * outputs), y=y, kept=y)
    if not folds:
        return y.movedim(-1, 1)
    total = fold_halo(y.movedim(-1, 1), folded).movedim(1, -1)
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.to(x.dtype).contiguous().movedim(-1, 1)


def conv_nd_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    mode: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """The op `conv_nd_weight_grad` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_nd_weight_grad_op(grad, x, list(kernel), stride, padding, mode, dilation, groups)
    geometry = Geometry.of(stride, padding, mode, dilation, groups)
    padded, geometry = _without(x, geometry, lambda axis: geometry.mode[axis] == POLE)
    inputs, outputs = x.shape[1] // groups, grad.shape[1] // groups
    if x.shape[0] == 0:
        return x.new_zeros(groups * outputs, inputs, *kernel)
    problem = Problem.of(x.shape[0], padded.shape[2:], grad.shape[2:], kernel, geometry, (inputs, outputs))
    launch = weight_launch(problem, x.element_size(), _target(x), precision=_precision(x))
    shape = (launch.constants["SPLITS"], groups, problem.taps, inputs, outputs)
    partial = x.new_empty(shape, dtype=torch.float32)
    launch(x=padded.movedim(1, -1).contiguous(), grad=grad.movedim(1, -1).contiguous(), partial=partial)
    total = partial.sum(0) if shape[0] > 1 else partial[0]
    return total.permute(0, 3, 2, 1).reshape(groups * outputs, inputs, *kernel).to(x.dtype).contiguous()


def _without(x: torch.Tensor, geometry: Geometry, copied: Callable[[int], bool]) -> tuple[torch.Tensor, Geometry]:
    """`x` with the halos of the `copied` axes written out, and the geometry that is left."""
    chosen = [copied(axis) for axis in range(len(geometry.mode))]
    halo = dataclasses.replace(geometry, mode=tuple(m if c else ZEROS for m, c in zip(geometry.mode, chosen)))
    left = dataclasses.replace(
        geometry,
        mode=tuple(ZEROS if c else m for m, c in zip(geometry.mode, chosen)),
        padding=tuple(0 if c else p for p, c in zip(geometry.padding, chosen)),
    )
    return add_halo(x, halo), left


def _bias(bias: torch.Tensor | None, x: torch.Tensor, channels: int) -> torch.Tensor:
    return x.new_zeros(channels) if bias is None else bias.contiguous()


def _target(x: torch.Tensor) -> int:
    """Compute capability as one number, e.g. 86; 86 under the interpreter, where tensors are on the CPU."""
    if x.device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _precision(x: torch.Tensor) -> str:
    """fp32 products follow PyTorch's own switch for convolutions; on CPU tensors (the interpreter) operands are
    widened first."""
    if x.device.type == "cpu":
        return "widened"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


_TYPES = {2: "bf16", 4: "fp32"}


def _case(name: str, launch: Launch, tensors: dict[str, str], targets: tuple[int, ...]) -> CompileCase:
    signature = {**tensors, **dict.fromkeys(launch.integers, "i32")}
    return CompileCase(
        name=name,
        kernel=launch.kernel,
        signature=signature,
        constexprs=launch.constants,
        aligned=(*tensors, *(key for key, value in launch.integers.items() if value % 16 == 0)),
        num_warps=launch.warps,
        num_stages=launch.stages,
        needs_mma=True,
        needs_vector_loads="packed" not in launch.kernel.__name__,
        targets=targets,
    )


def _size_cases(size: Size, itemsize: int, targets: tuple[int, ...]) -> list[CompileCase]:
    geometry, out = size.geometry(), size.spatial  # every benchmark size keeps its spatial shape
    kind, precision = _TYPES[itemsize], "tf32" if itemsize == 4 else "ieee"
    label = f"{size.name}/{kind}/" + "-".join(str(target) for target in targets)
    channels = (size.channels, size.outputs)
    forward = Problem.of(1, size.spatial, out, size.kernel, geometry, channels)
    adjoint = adjoint_problem(1, out, size.spatial, size.kernel, geometry, (size.outputs, size.channels))
    half, single = f"*{kind}", "*fp32"
    tensors = dict.fromkeys(("x", "weight", "bias", "y", "kept"), half)
    options = {"keep": False, "precision": precision}
    launches = [
        ("forward", forward_launch(forward, itemsize, targets[0], activation=1, **options), tensors),
        (
            "weight",
            weight_launch(forward, itemsize, targets[0], precision=precision),
            {"x": half, "grad": half, "partial": single},
        ),
    ]
    if not forward.packed:  # nothing lies before the stem that would want its input gradient
        launches.append(("adjoint", forward_launch(adjoint, itemsize, targets[0], activation=0, **options), tensors))
    return [_case(f"{kernel}/{label}", launch, types, targets) for kernel, launch, types in launches]


def compile_cases() -> tuple[CompileCase, ...]:
    """Stem, wide layer and factorised pair in bf16 with the sm_86 tiles; stem and wide layer with the large tiles;
    the wide layer in fp32 (tf32)."""
    cases: list[CompileCase] = []
    for size in BENCHMARK_SIZES:
        if size.name == "narrow":  # the kernels of the wide layer with smaller blocks
            continue
        cases += _size_cases(size, 2, (86, 89))
        if size.name in ("stem", "wide"):
            cases += _size_cases(size, 2, LARGE_SHARED_TARGETS)
        if size.name == "wide":
            cases += _size_cases(size, 4, (86,))
    return tuple(cases)
