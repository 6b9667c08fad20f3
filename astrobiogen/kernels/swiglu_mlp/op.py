"""The op `swiglu_mlp`: schema, shapes, argument checks, gradient formula and public function."""

from typing import Any

import torch

from astrobiogen.kernels import autocast, entries, registry
from astrobiogen.kernels.checks import check_float, check_same_device, check_shape, is_distributed
from astrobiogen.kernels.linear.op import linear
from astrobiogen.kernels.swiglu.op import swiglu
from astrobiogen.kernels.swiglu_mlp import reference

_ENTRY = entries.entry("swiglu_mlp")


def swiglu_mlp(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor
) -> torch.Tensor:
    """The SwiGLU block y = (silu(x Gᵀ) · (x Uᵀ)) Dᵀ (Shazeer 2020, arXiv:2002.05202), on the CPU as one op.

    Kept for the backward pass: x, x Gᵀ and x Uᵀ; where the op has a kernel (narrow fp32 blocks), the product in between
    exists for a few rows at a time. Other devices, distributed tensors, mixed dtypes and autocast take `linear`,
    `swiglu`, `linear`, each by its own rule.

    Args:
        x: [..., H], any floating-point dtype, any strides.
        gate_weight: G [I, H] on the device of `x`.
        up_weight: U [I, H].
        down_weight: D [H, I].

    Returns:
        [..., H] with the dtype of `x`.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices do not fit.
    """
    if not torch.compiler.is_dynamo_compiling() and not registry.reference_selected():
        result = _ENTRY(x, gate_weight, up_weight, down_weight)
        if result is not None:
            return result
    weights = {"gate_weight": gate_weight, "up_weight": up_weight, "down_weight": down_weight}
    for name, tensor in {"x": x, **weights}.items():
        check_float(name, tensor)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., H], got ()")
    if gate_weight.dim() != 2 or gate_weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"gate_weight must have shape [I, {x.shape[-1]}] ({x.shape[-1]}: the last axis of x), "
            f"got {tuple(gate_weight.shape)}"
        )
    inner, hidden = gate_weight.shape
    check_shape("up_weight", up_weight, (inner, hidden), "the shape of gate_weight")
    check_shape("down_weight", down_weight, (hidden, inner), "[H, I], gate_weight transposed")
    check_same_device(x=x, **weights)
    alike = x.dtype == gate_weight.dtype == up_weight.dtype == down_weight.dtype
    if x.device.type != "cpu" or not alike or autocast.enabled(x) or is_distributed(x):
        return linear(swiglu(linear(x, gate_weight), linear(x, up_weight)), down_weight)
    if registry.reference_selected():
        return reference.swiglu_mlp(x, gate_weight, up_weight, down_weight)
    return torch.ops.astrobiogen.swiglu_mlp(x, gate_weight, up_weight, down_weight)[0]


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _fake(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    del up, down
    return x.new_empty(x.shape), x.new_empty((_rows(x), 2 * gate.shape[0]))


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[torch.Tensor, ...]:
    del grad, gates
    weights = (one.new_empty(one.shape if need_weights else 0) for one in (gate, up, down))
    return x.new_empty(x.shape if need_x else 0), *weights


def _setup(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, *weights = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *weights)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_gates: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    del grad_gates  # internal: the public function never returns them
    if grad is None:
        return None, None, None, None
    needed = ctx.needs_input_grad
    grads = torch.ops.astrobiogen.swiglu_mlp_backward(grad, *ctx.saved_tensors, needed[0], any(needed[1:]))
    return tuple(value if need else None for value, need in zip(grads, needed))


registry.define(
    "swiglu_mlp(Tensor x, Tensor gate, Tensor up, Tensor down) -> (Tensor, Tensor)",
    operands="x: float *rows H; gate: x I H; up: x I H; down: x H I",
    reference=reference.swiglu_mlp_op,
    fake=_fake,
    cpu_rule="own kernel in fp32 where `linear` would have one on all cores but Intel's, there for weights of up to "
    "2,048, or 8,192 from 512 rows on; else PyTorch's products and the kernel of `swiglu`",
)
registry.define(
    "swiglu_mlp_backward(Tensor grad, Tensor x, Tensor gates, Tensor gate, Tensor up, Tensor down, bool need_x, "
    "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    operands="x: float *rows H; gate: x I H; up: x I H; down: x H I; grad: x *rows H; gates: x tokens 2I",
    reference=reference.swiglu_mlp_backward,
    fake=_fake_backward,
    cpu_rule="as `swiglu_mlp`",
)
registry.differentiable("swiglu_mlp", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("swiglu_mlp_backward")
