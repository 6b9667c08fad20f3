"""The ops `rms_norm` and `add_rms_norm`: schema, shapes, argument checks, gradient formula and public functions."""

from typing import Any

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.checks import check_float, check_number, check_same_device, check_shape
from astrobiogen.kernels.rms_norm import reference

_TRITON = "astrobiogen.kernels.rms_norm.triton_kernels"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight, with fp32 accumulation for half-precision input and one rounding at the end.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64; any strides, any number of rows including none.
        weight: [H], any of these dtypes on the device of `x` (a float32 weight with half-precision `x` is usual).
        eps: added to the mean square, dimension of x squared; >= 0.

    Under autocast, as `F.rms_norm`: on the CPU nothing changes; on other devices x is cast to float32 (float64 stays),
    and so y is float32.

    Returns:
        y [..., H] with the dtype and device of `x`.

    Raises:
        TypeError: `x` or `weight` is not a floating-point tensor, or `eps` is not a number.
        ValueError: `x` has no axis or H = 0, `weight` is not [H] or on another device, `eps` is negative or not finite.
    """
    _check(x, weight, eps)
    x = autocast.full_precision(x)
    if registry.reference_selected():
        return autocast.reference(reference.rms_norm, x, weight, eps)
    return torch.ops.astrobiogen.rms_norm(x, weight, float(eps))[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual addition followed by `rms_norm`, in one pass forward and one pass backward.

    s = x + residual;  y = s / sqrt(mean(s^2) + eps) * weight.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64.
        residual: shape, dtype and device of `x`.
        weight: [H], as in `rms_norm`.
        eps: as in `rms_norm`.

    Under autocast, as ``s = x + residual; rms_norm(s)``: s has the wider dtype of the two, y is as of `rms_norm`.

    Returns:
        (y, s), both [..., H] with the dtype of `x`. A gradient that comes back through s is added inside the same
        backward kernel.

    Raises:
        TypeError: a tensor is not a floating-point one, `residual` has another dtype than `x`, or `eps` is no number.
        ValueError: shapes or devices differ, or `eps` is negative or not finite.
    """
    _check(x, weight, eps)
    check_float("residual", residual)
    if x.dtype != residual.dtype:
        x, residual = autocast.widest(x=x, residual=residual)
    check_shape("residual", residual, tuple(x.shape), "the shape of x")
    check_same_device(x=x, residual=residual)
    if autocast.full_precision(x) is not x:  # the norm's result is float32 then, and the sum is not
        total = x + residual
        return rms_norm(total, weight, eps), total
    if registry.reference_selected():
        return autocast.reference(reference.add_rms_norm, x, residual, weight, eps)
    y, total, _ = torch.ops.astrobiogen.add_rms_norm(x, residual, weight, float(eps))
    return y, total


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check_float("x", x)
    check_float("weight", weight)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., H] with H >= 1, got {tuple(x.shape)}")
    check_shape("weight", weight, (x.shape[-1],), "[H], H the last axis of x")
    check_same_device(x=x, weight=weight)
    check_number("eps", eps)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")


def _rstd(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    del weight, eps
    return x.new_empty(x.shape), _rstd(x)


def _fake_add_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del residual, weight, eps
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd(x)


def _fake_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    del grad_y, rstd, grad_sum
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x, weight, output[-1])


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward(
    ctx: Any, grad_y: torch.Tensor | None, grad_rstd: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    del grad_rstd
    if grad_y is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.astrobiogen.rms_norm_backward(grad_y, x, weight, rstd, None)
    return grad_x, grad_weight, None


def _backward_add(
    ctx: Any, grad_y: torch.Tensor | None, grad_sum: torch.Tensor | None, grad_rstd: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
    del grad_rstd
    if grad_y is None:
        return grad_sum, grad_sum, None, None
    total, weight, rstd = ctx.saved_tensors
    grad_total, grad_weight = torch.ops.astrobiogen.rms_norm_backward(grad_y, total, weight, rstd, grad_sum)
    return grad_total, grad_total, grad_weight, None


registry.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    operands="x: float *rows H; weight: any H",
    reference=reference.rms_norm_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:rms_norm",
)
registry.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    operands="x: float *rows H; residual: x *rows H; weight: any H",
    reference=reference.add_rms_norm_forward,
    fake=_fake_add_forward,
    triton=f"{_TRITON}:add_rms_norm",
)
registry.define(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_sum) -> (Tensor, Tensor)",
    operands="x: float *rows H; grad_y: x *rows H; weight: any H; rstd: exact *rows; grad_sum: x *rows H",
    reference=reference.rms_norm_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:rms_norm_backward",
)
registry.differentiable("rms_norm", backward=_backward, setup_context=_setup)
registry.differentiable("add_rms_norm", backward=_backward_add, setup_context=_setup_add)
registry.refuse_second_derivative("rms_norm_backward")
