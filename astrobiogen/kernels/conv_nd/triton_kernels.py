"""CUDA launchers of `conv_nd`, `conv_nd_norm`, `conv_transpose_nd` and `conv_nd_weight_grad`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.conv_nd import reference
from astrobiogen.kernels.conv_nd.geometry import (
    CIRCULAR,
    GROUP,
    POLE,
    ZEROS,
    Geometry,
    Norm,
    add_halo,
    fold_halo,
)
from astrobiogen.kernels.conv_nd.triton.launch import (
    Problem,
    adjoint_problem,
    forward_launch,
    holds_all_channels,
    position_tile,
    weight_launch,
)
from astrobiogen.kernels.conv_nd.triton.norm_launch import (
    GROUP_CHANNELS,
    SUM_PROGRAMS,
    TILE_ELEMENTS,
    affine,
    conv_nd_norm_backward,
    group_statistics,
    normalize_rows,
    row_blocks,
    scale_group,
)
from astrobiogen.kernels.conv_nd.triton.weight import row_sums
from astrobiogen.kernels.conv_nd.triton_cases import compile_cases
from astrobiogen.kernels.triton_launch import INTERPRETER, capability, launch

__all__ = [
    "compile_cases",
    "conv_nd",
    "conv_nd_bias_grad",
    "conv_nd_norm",
    "conv_nd_norm_backward",
    "conv_nd_weight_grad",
    "conv_transpose_nd",
]

# The ops below take their geometry as the schema lists it: stride, padding, mode, dilation, groups.


def conv_nd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `conv_nd` on CUDA: y, and what went into the activation if `keep`. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_nd_op(x, weight, bias, *options)
    *lists, activation, keep = options
    call = _Forward.of(x, weight, Geometry.of(*lists))
    y = call.empty(x)
    kept = torch.empty_like(y) if keep else x.new_empty(0)
    call(y, bias, activation=activation, kept=kept if keep else None)
    return y.movedim(-1, 1), kept.movedim(-1, 1) if keep else kept


def conv_nd_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `conv_nd_norm` on CUDA. A channel norm is part of the convolution's epilogue where a tile holds all
    channels, else one more pass; a group norm takes its statistics from the epilogue and one more pass. fp64 runs the
    reference."""
    if x.dtype == torch.float64:
        return reference.conv_nd_norm_op(x, weight, bias, norm_weight, norm_bias, *options)
    *lists, kind, groups, eps, activation, keep = options
    norm = Norm(kind, groups, eps)
    call = _Forward.of(x, weight, Geometry.of(*lists))
    y = call.empty(x)
    kept = torch.empty_like(y) if keep else x.new_empty(0)
    shapes = norm.statistics_shapes((y.shape[0], y.shape[-1], *y.shape[1:-1]), keep)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    gamma, beta = affine(y.shape[-1], norm_weight, norm_bias, x)
    result = y.movedim(-1, 1), kept.movedim(-1, 1) if keep else kept, mean, rstd
    if y.numel() == 0:
        return result
    if kind == GROUP:
        tile = position_tile(call.problem, x.element_size(), _target(x))
        tiles = call.problem.planes * -(-call.problem.plane // tile)
        partial = x.new_empty(2, tiles, y.shape[-1], dtype=torch.float32)
        call(y, bias, kept=kept if keep else None, norm=(kind, gamma, beta, partial[0], partial[1], eps))
        group_statistics(norm, call.problem, tile, partial, mean, rstd)
        scale_group(kept if keep else y, y, norm, mean, rstd, gamma, beta, activation)
    elif holds_all_channels(call.problem, x.element_size(), _target(x)):
        call(y, bias, activation=activation, kept=kept if keep else None, norm=(kind, gamma, beta, mean, rstd, eps))
    else:
        call(kept if keep else y, bias)
        normalize_rows(kept if keep else y, y, norm, gamma, beta, mean, rstd, activation, keep)
    return result


@dataclasses.dataclass(frozen=True)
class _Forward:
    """One forward convolution on CUDA: its rows, packed weight and sizes."""

    rows: torch.Tensor
    weight: torch.Tensor
    problem: Problem

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> "_Forward":
        padded, geometry = _without(x, geometry, lambda axis: geometry.mode[axis] == POLE)
        kernel, groups = weight.shape[2:], geometry.groups
        out = geometry.output_size(padded.shape[2:], kernel)
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        problem = Problem.of(x.shape[0], padded.shape[2:], out, kernel, geometry, (inputs, outputs))
        packed = weight.reshape(groups, outputs, inputs, -1).permute(0, 3, 2, 1).contiguous()
        return cls(padded.movedim(1, -1).contiguous(), packed, problem)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """Output rows [B, *out, O]."""
        out = self.problem.target[-(x.dim() - 2) :]
        return x.new_empty(x.shape[0], *out, self.problem.groups * self.problem.target_channels)

    def __call__(
        self,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        activation: int = 0,
        kept: torch.Tensor | None = None,
        norm: tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float] | None = None,
    ) -> None:
        """Launch into `y`. `norm`: kind, gamma, beta, mean, rstd, eps."""
        if y.numel() == 0:
            return
        kind, gamma, beta, mean, rstd, eps = norm if norm is not None else (0, y, y, y, y, 0.0)
        start = forward_launch(
            self.problem,
            y.element_size(),
            _target(y),
            precision=_precision(y),
            activation=activation,
            keep=kept is not None,
            norm=kind,
        )
        shift = _bias(bias, y, y.shape[-1])
        tensors = {
            "y": y,
            "kept": y if kept is None else kept,
            "gamma": gamma,
            "beta": beta,
            "mean": mean,
            "rstd": rstd,
        }
        start(x=self.rows, weight=self.weight, bias=shift, eps=eps, **tensors)


def conv_transpose_nd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> torch.Tensor:
    """The op `conv_transpose_nd` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_transpose_nd_op(x, weight, bias, *options)
    *lists, size = options
    geometry = Geometry.of(*lists)
    groups = geometry.groups
    # The adjoint of circular padding wraps inside the kernel where input and output positions are the same ones;
    # other halos are summed up behind the kernel, from fp32.
    rows = zip(geometry.mode, geometry.stride, size, x.shape[2:])
    wraps = [kind == CIRCULAR and step == 1 and n == q for kind, step, n, q in rows]
    kept = tuple(ZEROS if wrap else kind for wrap, kind in zip(wraps, geometry.mode))
    folded = dataclasses.replace(geometry, mode=kept)
    inner = dataclasses.replace(folded.after_halo(), mode=tuple(CIRCULAR if wrap else ZEROS for wrap in wraps))
    padded = [n + 2 * halo for n, halo in zip(size, folded.halo)]
    folds = padded != list(size)
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    y = x.new_empty(x.shape[0], *padded, groups * outputs, dtype=torch.float32 if folds else x.dtype)
    if y.numel() > 0:
        problem = adjoint_problem(x.shape[0], x.shape[2:], padded, weight.shape[2:], inner, (inputs, outputs))
        packed = weight.reshape(groups, inputs, outputs, -1).permute(0, 3, 1, 2)
        packed = (packed if problem.transposed else packed.flip(1)).contiguous()
        start = forward_launch(problem, x.element_size(), _target(x), precision=_precision(x))
        shift = _bias(None if folds else bias, x, groups * outputs)
        unused = dict.fromkeys(("kept", "gamma", "beta", "mean", "rstd"), y)
        start(x=x.movedim(1, -1).contiguous(), weight=packed, bias=shift, y=y, eps=0.0, **unused)
    if not folds:
        return y.movedim(-1, 1)
    total = fold_halo(y.movedim(-1, 1), folded).movedim(1, -1)
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.to(x.dtype).contiguous().movedim(-1, 1)


def conv_nd_weight_grad(grad: torch.Tensor, x: torch.Tensor, kernel: list[int], *lists: Any) -> torch.Tensor:
    """The op `conv_nd_weight_grad` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.conv_nd_weight_grad_op(grad, x, list(kernel), *lists)
    geometry = Geometry.of(*lists)
    groups = geometry.groups
    padded, geometry = _without(x, geometry, lambda axis: geometry.mode[axis] == POLE)
    inputs, outputs = x.shape[1] // groups, grad.shape[1] // groups
    if x.shape[0] == 0:
        return x.new_zeros(groups * outputs, inputs, *kernel)
    problem = Problem.of(x.shape[0], padded.shape[2:], grad.shape[2:], kernel, geometry, (inputs, outputs))
    start = weight_launch(problem, x.element_size(), _target(x), precision=_precision(x))
    shape = (start.splits, groups, problem.taps, inputs, outputs)
    partial = x.new_empty(shape, dtype=torch.float32)
    start(x=padded.movedim(1, -1).contiguous(), grad=grad.movedim(1, -1).contiguous(), partial=partial)
    total = partial.sum(0) if shape[0] > 1 else partial[0]
    return total.permute(0, 3, 2, 1).reshape(groups * outputs, inputs, *kernel).to(x.dtype).contiguous()


def conv_nd_bias_grad(grad: torch.Tensor) -> torch.Tensor:
    """The op `conv_nd_bias_grad` on CUDA. fp64 runs the reference."""
    if grad.dtype == torch.float64 or grad.numel() == 0:
        return reference.conv_nd_bias_grad_op(grad)
    rows = grad.movedim(1, -1).contiguous()
    channels, count = rows.shape[-1], rows.numel() // rows.shape[-1]
    block_c = min(GROUP_CHANNELS, row_blocks(channels)[0])
    block_r, tiles = TILE_ELEMENTS // block_c, -(-channels // block_c)
    programs = max(1, min(SUM_PROGRAMS // tiles, -(-count // block_r)))
    partial = grad.new_empty(programs, channels, dtype=torch.float32)
    launch(row_sums, (programs * tiles,))(
        rows, partial, count, C=channels, BLOCK_R=block_r, BLOCK_C=block_c
    )  # fmt: skip
    return partial.sum(0).to(grad.dtype)


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
    """Compute capability as one number, e.g. 86; the interpreter has tiles of sm_86."""
    return capability(x.device) or 86


def _precision(x: torch.Tensor) -> str:
    """fp32 products are fp32, or TF32 where it was asked for: with `torch.set_float32_matmul_precision("high")` or
    PyTorch's newer `fp32_precision`, unless the convolutions' own says "ieee". The convolutions' own cannot ask: it
    is "tf32" from the start. Under the interpreter operands are widened first."""
    if capability(x.device) == INTERPRETER:
        return "widened"
    settings = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return "tf32" if x.dtype == torch.float32 and settings == ("tf32", "tf32") else "ieee"
