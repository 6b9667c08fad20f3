"""Builds a case's arguments, moves them into poisoned memory, and evaluates a function with its gradients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astrobiogen.kernels.cases import Case, TensorMaker

Function = Callable[..., Any]
Arguments = dict[str, Any]

# Elements of poison before and after a guarded tensor: 64 keep every supported dtype's alignment at 128 bytes or more,
# 65 break it down to the element's own size.
ALIGNED_MARGIN = 64
UNALIGNED_MARGIN = 65


@dataclasses.dataclass(frozen=True)
class Result:
    """What one evaluation gave: the outputs, and one gradient per differentiable argument (None if autograd gave
    none).
    """

    outputs: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Guard:
    """A copy of a tensor inside a larger poisoned buffer, and the buffer's bytes as they were."""

    name: str
    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor

    def changed(self) -> bool:
        """True if anything in the buffer, the tensor or the poison around it, has other bits than before."""
        return not same_bits(self.buffer, self.before)


def maker(dtype: torch.dtype, device: str | torch.device, seed: int) -> TensorMaker:
    """A `TensorMaker` whose generator starts from `seed`."""
    return TensorMaker(dtype, torch.device(device), torch.Generator().manual_seed(seed))


def build(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Arguments:
    """The case's arguments; the same numbers, rounded to `dtype`, for every dtype."""
    return case.build(maker(dtype, device, seed))


def upcast(arguments: Arguments) -> Arguments:
    """The same values with every floating-point tensor in fp64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def guard(name: str, tensor: torch.Tensor, margin: int) -> Guard:
    """Copy `tensor`, strides kept, into a buffer that is NaN (integers: a huge negative number) everywhere else.

    The gaps that a non-contiguous tensor leaves between its elements are poisoned too.
    """
    source = tensor.detach()
    extent = 0 if source.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride()))
    buffer = torch.full((extent + 2 * margin,), _poison(source.dtype), dtype=source.dtype, device=source.device)
    if extent:
        used = torch.arange(extent, device=source.device).as_strided(source.shape, source.stride()).reshape(-1).unique()
        flat = source.as_strided((extent,), (1,), source.storage_offset())
        buffer[margin + used] = flat[used]
    inner = buffer.as_strided(source.shape, source.stride(), margin)
    return Guard(name, inner, buffer, buffer.clone())


def guard_all(arguments: Arguments, margin: int) -> tuple[Arguments, list[Guard]]:
    """`guard` every tensor argument; the others pass through."""
    guards = [guard(name, value, margin) for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    return {**arguments, **{item.name: item.tensor for item in guards}}, guards


def evaluate(
    function: Function, arguments: Arguments, differentiable: Sequence[str], upstream: Sequence[torch.Tensor | None]
) -> Result:
    """Call `function` and pull `upstream` back through it.

    Args:
        function: takes `arguments` by name, returns a tensor or a tuple of tensors.
        arguments: tensors and plain values.
        differentiable: names whose gradients are wanted.
        upstream: one gradient per output; None leaves that output out of the backward pass. Empty: forward only.
    """
    leaves = {name: arguments[name].detach().requires_grad_(True) for name in differentiable} if upstream else {}
    outputs = as_tuple(function(**{**arguments, **leaves}))
    # A wrong shape is reported with the outputs; autograd would stop here.
    pairs = [(o, g) for o, g in zip(outputs, upstream) if g is not None and o.requires_grad and o.shape == g.shape]
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(leaves)
    if pairs and leaves:
        roots, weights = [o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs]
        gradients = dict(zip(leaves, torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True)))
    return Result(tuple(o.detach() for o in outputs), gradients)


def draw_upstream(
    case: Case, outputs: Sequence[torch.Tensor], *, only: int | None = None, expanded: bool = False, seed: int = 1
) -> list[torch.Tensor | None]:
    """Random gradients for `outputs`.

    Args:
        case: without differentiable arguments there is nothing to draw.
        outputs: results whose shape, dtype and device the gradients take.
        only: None for all outputs, or the index of the one that gets a gradient.
        expanded: one number expanded to the output's shape (all strides zero), as `output.sum().backward()` gives.
        seed: of the generator.
    """
    if not case.differentiable:
        return []
    gradients: list[torch.Tensor | None] = []
    for index, output in enumerate(outputs):
        make = maker(output.dtype, output.device, seed + index)
        wanted = output.is_floating_point() and only in (None, index)
        value = make.randn(*([1] * output.ndim if expanded else output.shape))
        gradients.append(value.expand(output.shape) if wanted else None)
    return gradients


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    """A function's result as a tuple of tensors."""
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """True for equal shape, dtype and bits; NaN equals NaN of the same bits, -0.0 differs from 0.0."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bits(left), _bits(right))


def different_bits(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Elementwise: True where the bits of two tensors of one shape and dtype differ."""
    return _bits(left) != _bits(right)


def name_of(function: Function) -> str:
    """The function's name for messages."""
    return getattr(function, "__name__", repr(function))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().contiguous()
    if not dense.is_floating_point():
        return dense
    return dense.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dense.element_size()])


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min // 2
