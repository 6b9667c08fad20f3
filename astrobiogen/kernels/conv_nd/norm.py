"""The ops `conv_nd_norm` and `conv_nd_norm_backward`: a convolution with a norm over its channels and an activation in
the same pass."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.conv_nd import raw, reference
from astrobiogen.kernels.conv_nd.arguments import check_arguments, check_norm
from astrobiogen.kernels.conv_nd.geometry import ACTIVATIONS, Geometry, Norm, channel_last
from astrobiogen.kernels.conv_nd.layout import MemoryFormat, arrange, numbers, same_size
from astrobiogen.kernels.conv_nd.op import (
    CPU_RULE,
    GEOMETRY_SCHEMA,
    Activation,
    Ints,
    Padding,
    PaddingMode,
    conv_gradients,
    empty_channel_last,
    schema_lists,
    unbatched,
)
from astrobiogen.kernels.values import needs_gradient

_TRITON = "astrobiogen.kernels.conv_nd.triton_kernels"

NormKind = Literal["rms", "layer", "group"]


def conv_nd_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    norm: NormKind,
    norm_groups: int = 1,
    eps: float = 1e-5,
    stride: Ints = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
    dilation: Ints = 1,
    groups: int = 1,
    activation: Activation = None,
    memory_format: MemoryFormat = "channels_last",
) -> torch.Tensor:
    """act(norm(conv_nd(x, weight, bias)) * norm_weight + norm_bias): convolution, norm over channels and activation.

    norm(z) = (z - mean) / sqrt(variance + eps), statistics in fp32 or wider:

    * "layer": mean and (biased) variance over the channels of each position;
    * "rms": mean 0, variance = mean square over the channels of each position;
    * "group": over the channels of one of `norm_groups` groups and all positions of a sample.

    Args:
        x, weight, bias, stride, padding, padding_mode, dilation, groups, activation, memory_format: as `conv_nd`.
        norm_weight, norm_bias: [O] or None (1 and 0), dtype and device of `x`; an RMS norm takes a bias too.
        norm: "rms", "layer" or "group".
        norm_groups: groups of a "group" norm, divides O; 1 for the others.
        eps: > 0, added to the variance.

    Under autocast, as convolution, norm and activation one after the other: x, weight and bias are cast to the autocast
    dtype (float64 stays), and y has it on the CPU; on other devices PyTorch's norms give float32, so y is float32. Here
    norm_weight and norm_bias are cast too, and y is rounded once, from sums in fp32.

    Returns:
        y [B, O, *out], or [O, *out] without a batch, with the dtype of `x`. Once differentiable on the kernels, any
        number of times under `use_kernels("reference")`.

    Raises:
        TypeError, ValueError: as `conv_nd`, and for the norm's arguments.

    Source: Ba et al. 2016 (layer), Zhang and Sennrich 2019 (RMS), Wu and He 2018 (group).
    """
    if unbatched(x, weight):
        y = conv_nd_norm(
            x.unsqueeze(0), weight, bias, norm_weight, norm_bias, norm=norm, norm_groups=norm_groups, eps=eps,
            stride=stride, padding=padding, padding_mode=padding_mode, dilation=dilation, groups=groups,
            activation=activation, memory_format=memory_format,
        )  # fmt: skip
        return y.squeeze(0)
    tensors = autocast.lower_precision(x, weight, bias, norm_weight, norm_bias)
    x, weight, bias, norm_weight, norm_bias = tensors
    sides = numbers(padding, weight, dilation)
    geometry = check_arguments(x, weight, bias, stride, sides, padding_mode, dilation, groups, activation)
    chosen = check_norm(x, weight.shape[0], norm_weight, norm_bias, norm, norm_groups, eps)
    given = x
    if isinstance(padding, str) and padding == "same":
        x, geometry = same_size(x, weight.shape[2:], geometry)
    if registry.reference_selected():
        y = autocast.reference(
            reference.conv_nd_norm, x, weight, bias, norm_weight, norm_bias, geometry, chosen, activation
        )
        return autocast.full_precision(arrange(channel_last(y), given, weight, memory_format))
    keep = needs_gradient(x, weight, bias, norm_weight, norm_bias)
    options = (*schema_lists(geometry), chosen.kind, chosen.groups, chosen.eps, ACTIVATIONS.index(activation), keep)
    y = torch.ops.astrobiogen.conv_nd_norm(x, weight, bias, norm_weight, norm_bias, *options)[0]
    return autocast.full_precision(arrange(y, given, weight, memory_format))


def _fake_conv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    del bias, norm_weight, norm_bias
    *lists, kind, groups, eps, _, keep = options
    out = Geometry.of(*lists).output_size(x.shape[2:], weight.shape[2:])
    y = empty_channel_last(x, weight.shape[0], out)
    kept = empty_channel_last(x, weight.shape[0], out) if keep else x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, kept, *(x.new_empty(s, dtype=wide) for s in Norm(kind, groups, eps).statistics_shapes(y.shape, keep))


def _fake_norm_backward(
    grad: torch.Tensor, kept: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad, rest
    grad_z = empty_channel_last(kept, kept.shape[1], kept.shape[2:])
    return grad_z, kept.new_empty(kept.shape[1]), kept.new_empty(kept.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, norm_weight, norm_bias, *geometry, kind, groups, _, activation, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.geometry, ctx.norm, ctx.keep = geometry, (kind, groups, activation), keep
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, *output[1:])


def _backward(ctx: Any, grad: torch.Tensor | None, *others: torch.Tensor | None) -> tuple[Any, ...]:
    del others  # kept values and statistics
    nothing = (None,) * 10
    if grad is None:
        return None, None, None, None, None, *nothing
    if not ctx.keep:
        raise RuntimeError("astrobiogen::conv_nd_norm was called with keep=False, so it has no gradient")
    x, weight, norm_weight, norm_bias, kept, mean, rstd = ctx.saved_tensors
    grad_z, grad_norm_weight, grad_norm_bias = torch.ops.astrobiogen.conv_nd_norm_backward(
        grad, kept, norm_weight, norm_bias, mean, rstd, *ctx.norm
    )
    gradients = conv_gradients(grad_z, x, weight, ctx.geometry, ctx.needs_input_grad[:3])
    needed = ctx.needs_input_grad[3:5]
    norms = (g if need else None for g, need in zip((grad_norm_weight, grad_norm_bias), needed))
    return *gradients, *norms, *nothing


registry.define(
    "conv_nd_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    f"{GEOMETRY_SCHEMA}, int norm, int norm_groups, float eps, int activation, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    operands="x: float B C *size; weight: x O D *kernel; bias: x O; norm_weight: x O; norm_bias: x O",
    also=raw.check_conv,
    reference=reference.conv_nd_norm_op,
    fake=_fake_conv_norm,
    triton=f"{_TRITON}:conv_nd_norm",
    cpu_rule=CPU_RULE,
)
registry.define(
    "conv_nd_norm_backward(Tensor grad, Tensor kept, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, "
    "Tensor rstd, int norm, int norm_groups, int activation) -> (Tensor, Tensor, Tensor)",
    operands="kept: float B O *size; grad: kept B O *size; norm_weight: kept O; "
    "norm_bias: kept O; mean: exact *means; rstd: exact *rstds",
    also=raw.check_norm_backward,
    reference=reference.conv_nd_norm_backward_op,
    fake=_fake_norm_backward,
    triton=f"{_TRITON}:conv_nd_norm_backward",
)
registry.differentiable("conv_nd_norm", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("conv_nd_norm_backward")
