"""The ops `swiglu` and `swiglu_packed`: schema, shapes, argument checks, gradient formula and public functions."""

from typing import Any

import torch

from astrobiogen.kernels import autocast, entries, registry
from astrobiogen.kernels.checks import check_float, check_same_device, check_shape
from astrobiogen.kernels.swiglu import reference

_TRITON = "astrobiogen.kernels.swiglu.triton_kernels"

_ENTRY = entries.entry("swiglu")
_PACKED_ENTRY = entries.entry("swiglu_packed")


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gated activation of a SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202).

    h = silu(gate) * up, silu(g) = g / (1 + exp(-g)), in fp32 for half-precision input with one rounding at the end.

    Args:
        gate: [..., I], float32, bfloat16, float16 or float64; any strides (halves of one packed tensor need no copy),
            any size including none.
        up: shape, dtype and device of `gate`; its own strides.

    Under autocast, as ``F.silu(gate) * up``: both in the wider of their dtypes.

    Returns:
        h [..., I], contiguous, with the dtype and device of `gate`. Saved for the backward pass: `gate` and `up` only.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: the shapes or devices differ.
    """
    if not torch.compiler.is_dynamo_compiling() and not registry.reference_selected():
        result = _ENTRY(gate, up)
        if result is not None:
            return result
    check_float("gate", gate)
    check_float("up", up)
    if gate.dtype != up.dtype:
        gate, up = autocast.widest(gate=gate, up=up)
    check_shape("up", up, tuple(gate.shape), "the shape of gate")
    check_same_device(gate=gate, up=up)
    if registry.reference_selected():
        return autocast.reference(reference.swiglu, gate, up)
    return torch.ops.astrobiogen.swiglu(gate, up)


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` of the two halves of one tensor, as a fused gate-and-up projection returns them.

    h = silu(gate_up[..., :I]) * gate_up[..., I:]. Neither half is copied; the backward pass writes one packed gradient.

    Args:
        gate_up: [..., 2 I], float32, bfloat16, float16 or float64; any strides.

    Autocast changes nothing, as for ``F.silu(gate) * up`` of one dtype.

    Returns:
        h [..., I], contiguous, with the dtype and device of `gate_up`.

    Raises:
        TypeError: `gate_up` is not a floating-point tensor.
        ValueError: `gate_up` has no axis or its last axis is odd.
    """
    if not torch.compiler.is_dynamo_compiling() and not registry.reference_selected():
        result = _PACKED_ENTRY(gate_up)
        if result is not None:
            return result
    check_float("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up must have shape [..., 2 I] with an even last axis, got {tuple(gate_up.shape)}")
    if registry.reference_selected():
        return autocast.reference(reference.swiglu_packed, gate_up)
    return torch.ops.astrobiogen.swiglu_packed(gate_up)


def _fake_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    del up
    return gate.new_empty(gate.shape)


def _fake_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    del grad
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _fake_packed(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_packed_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    del grad
    return gate_up.new_empty(gate_up.shape)


def _fake_backward_product(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_backward(grad, gate, up), gate.new_empty(gate.shape)


def _save_inputs(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.astrobiogen.swiglu_backward(grad, *ctx.saved_tensors)


def _packed_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return torch.ops.astrobiogen.swiglu_packed_backward(grad, *ctx.saved_tensors)


registry.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    operands="gate: float *shape; up: gate *shape",
    reference=reference.swiglu,
    fake=_fake_forward,
    triton=f"{_TRITON}:swiglu",
)
registry.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    operands="gate: float *shape; up: gate *shape; grad: gate *shape",
    reference=reference.swiglu_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:swiglu_backward",
)
registry.define(
    "swiglu_packed(Tensor gate_up) -> Tensor",
    operands="gate_up: float *rows 2I",
    reference=reference.swiglu_packed,
    fake=_fake_packed,
    triton=f"{_TRITON}:swiglu_packed",
)
registry.define(
    "swiglu_packed_backward(Tensor grad, Tensor gate_up) -> Tensor",
    operands="gate_up: float *rows 2I; grad: gate_up *rows I",
    reference=reference.swiglu_packed_backward,
    fake=_fake_packed_backward,
    triton=f"{_TRITON}:swiglu_packed_backward",
)
registry.define(
    "swiglu_backward_product(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)",
    operands="gate: float *shape; up: gate *shape; grad: gate *shape",
    reference=reference.swiglu_backward_product,
    fake=_fake_backward_product,
    triton=f"{_TRITON}:swiglu_backward_product",
)
registry.differentiable("swiglu", backward=_backward, setup_context=_save_inputs)
registry.differentiable("swiglu_packed", backward=_packed_backward, setup_context=_save_inputs)
registry.refuse_second_derivative("swiglu_backward")
registry.refuse_second_derivative("swiglu_packed_backward")
registry.refuse_second_derivative("swiglu_backward_product")
