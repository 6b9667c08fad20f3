"""The op `linear`: schema, shapes, argument checks, gradient formula and public function."""

from typing import Any

import torch

from astrobiogen.kernels import autocast, entries, registry
from astrobiogen.kernels.checks import check_float, check_same_device, check_shape
from astrobiogen.kernels.linear import reference

_ENTRY = entries.entry("linear")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b over the last axis, with a CPU kernel for narrow fp32 layers; the rest is `torch.nn.functional.linear`.

    A BLAS is made for large matrices: at widths of 8 to 256 it spends a third of its time on packing its operands. The
    kernel packs the weight alone, and nothing for the weight's gradient.

    Args:
        x: [..., K], any floating-point dtype, any strides.
        weight: [N, K] on the device of `x`.
        bias: [N] or None.

    Under autocast this is `F.linear`: all three are cast to the autocast dtype (float64 stays).

    Returns:
        [..., N] with the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit.
    """
    if not torch.compiler.is_dynamo_compiling() and not registry.reference_selected():
        result = _ENTRY(x, weight, bias)
        if result is not None:
            return result
    check_float("x", x)
    check_float("weight", weight)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got ()")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape [N, {x.shape[-1]}] ({x.shape[-1]}: the last axis of x), got {tuple(weight.shape)}"
        )
    check_same_device(x=x, weight=weight)
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, (weight.shape[0],), "[N], the rows of weight")
        check_same_device(x=x, bias=bias)
    own = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not own or registry.reference_selected() or autocast.enabled(x):
        return reference.linear(x, weight, bias)
    return torch.ops.astrobiogen.linear(x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    del bias
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    del grad
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad_x, grad_weight = torch.ops.astrobiogen.linear_backward(grad, *ctx.saved_tensors, need_x, need_weight)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad.flatten(0, -2).sum(0) if need_bias else None,
    )


registry.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    operands="x: float *rows K; weight: x N K; bias: x N",
    reference=reference.linear,
    fake=_fake,
    cpu_rule="fp32 on cores other than Intel's: own kernel for weights [8..512, 1..512] from 64 rows and 131,072 "
    "multiply-adds on; else PyTorch (MKL, oneDNN)",
)
registry.define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    operands="x: float *rows K; weight: x N K; grad: x *rows N",
    reference=reference.linear_backward,
    fake=_fake_backward,
    cpu_rule="as `linear`",
)
registry.differentiable("linear", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("linear_backward")
