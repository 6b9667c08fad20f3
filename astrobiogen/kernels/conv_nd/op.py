"""The ops `conv_nd`, `conv_transpose_nd`, `conv_nd_weight_grad` and `conv_nd_bias_grad`: schemas, shapes, gradient
formulas and public functions.

The first three are the partial derivatives of one trilinear form <grad, conv(x, weight)>, so each one's gradients are
the other two: any number of derivatives works, with no backward op beside them. The fourth is a sum over positions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.conv_nd import builtin, raw, reference
from astrobiogen.kernels.conv_nd.arguments import check_arguments, check_transposed_arguments
from astrobiogen.kernels.conv_nd.geometry import ACTIVATIONS, Geometry, channel_last
from astrobiogen.kernels.conv_nd.layout import MemoryFormat, arrange, numbers, same_size
from astrobiogen.kernels.values import needs_gradient

_TRITON = "astrobiogen.kernels.conv_nd.triton_kernels"

# csrc/conv_nd/conv_nd.cpp, own_kernel; the figures behind it are in the README.
CPU_RULE = (
    "own kernel for float32, bfloat16 and float16 with >= 8 outputs per group and either <= 4 inputs per group, one "
    "tap over the last three of four or five axes, or pairs of outputs that leave <= 3/4 of the products, and for "
    "windows that do not overlap (stride = kernel, no padding, one group); otherwise a composition of ATen convolutions"
)
_PUBLIC_RULE = f"{builtin.RULE}. Otherwise, and as an op: {CPU_RULE}"

Ints = int | Sequence[int]
Padding = Ints | Literal["same", "valid"]
PaddingMode = Literal["zeros", "circular", "reflect", "replicate", "pole"]
Activation = Literal["silu", "gelu"] | None


def conv_nd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
    dilation: Ints = 1,
    groups: int = 1,
    activation: Activation = None,
    memory_format: MemoryFormat = "channels_last",
) -> torch.Tensor:
    """Convolution (cross-correlation, as in PyTorch) over one to five spatial axes, with bias and activation in the
    same pass.

    y[b, o, q] = act(bias[o] + sum_{c, k} weight[o, c, k] * P(x)[b, c, q * stride + k * dilation - padding]), sums in
    fp32 for half precision.

    Args:
        x: [B, C, *spatial] or, without a batch, [C, *spatial]; float32, bfloat16, float16 or float64, one to five
            spatial axes, any strides; B may be 0.
        weight: [O, C / groups, *kernel], dtype and device of `x`.
        bias: [O] or None.
        stride, padding, dilation: one integer, or one per spatial axis. Padding is added at both ends of the axis; the
            word "valid" adds none, "same" as much as keeps the size (stride 1; of an odd number of rows the end of the
            axis takes one more).
        padding_mode: how P extends `x` over the padding; one word, or one per spatial axis:
            "zeros"; "circular" (the axis closes on itself, e.g. longitude); "reflect" (mirrored, the edge row not
            repeated);
            "replicate" (the edge row repeated); "pole" (a latitude axis that is followed by a longitude axis of even
            size: the row beyond the
            pole is the edge row seen from the other side, so rows are mirrored with the edge repeated and rolled by
            half the width).
        groups: channels are split in this many independent groups; groups = C is a depthwise convolution.
        activation: None, "silu" (z * sigmoid(z)) or "gelu" (z * Phi(z), the exact form).
        memory_format: of the result. "channels_last": channels are innermost in memory, as the kernels write them and
            a following convolution reads them without a copy (then `y.flatten(1)` copies, and `y.view(B, -1)` has no
            meaning). "preserve", as PyTorch's convolutions do and `layers.ConvNd` asks for: channels-last where `x` or
            `weight` is, else contiguous, for one copy.

    Under autocast, as `F.conv3d`: x, weight and bias are cast to the autocast dtype (float64 stays).

    Returns:
        y [B, O, *out], or [O, *out] without a batch, with the dtype of `x`, out = floor((size + 2 padding - dilation
        (kernel - 1) - 1) / stride) + 1.

    Raises:
        TypeError: an argument is not a floating-point tensor or an integer, or dtypes differ.
        ValueError: shapes, devices, sizes or words do not fit; the message names the argument and the axis.

    Source: dense convolution as `torch.nn.functional.conv3d`, extended to N axes; "pole" as the `earth` padding of
    CREDIT (https://github.com/NCAR/miles-credit).
    """
    if autocast.anywhere():
        x, weight, bias = autocast.lower_precision(x, weight, bias)
    try:
        y = builtin.serve(x, weight, bias, stride, padding, padding_mode, dilation, groups, memory_format, activation)
    except (RuntimeError, TypeError, ValueError):  # PyTorch's words for what the checks name
        sides = numbers(padding, weight, dilation)
        check_arguments(x, weight, bias, stride, sides, padding_mode, dilation, groups, activation)
        raise
    if y is not None:
        return y
    if unbatched(x, weight):
        y = conv_nd(
            x.unsqueeze(0), weight, bias, stride=stride, padding=padding, padding_mode=padding_mode, dilation=dilation,
            groups=groups, activation=activation, memory_format=memory_format,
        )  # fmt: skip
        return y.squeeze(0)
    sides = numbers(padding, weight, dilation)
    geometry = check_arguments(x, weight, bias, stride, sides, padding_mode, dilation, groups, activation)
    given = x
    if isinstance(padding, str) and padding == "same":
        x, geometry = same_size(x, weight.shape[2:], geometry)
    if registry.reference_selected():
        y = channel_last(autocast.reference(reference.conv_nd, x, weight, bias, geometry, activation))
        return arrange(y, given, weight, memory_format)
    keep = activation is not None and needs_gradient(x, weight, bias)
    options = (*schema_lists(geometry), ACTIVATIONS.index(activation), keep)
    y = torch.ops.astrobiogen.conv_nd(x, weight, bias, *options)[0]
    return arrange(y, given, weight, memory_format)


def conv_transpose_nd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
    dilation: Ints = 1,
    groups: int = 1,
    memory_format: MemoryFormat = "channels_last",
) -> torch.Tensor:
    """The adjoint of `conv_nd` with the same weight: <conv_nd(u, weight), x> = <u, conv_transpose_nd(x, weight)> for
    all u; plus a bias.

    Args:
        x: [B, C, *spatial] or [C, *spatial], one to five spatial axes.
        weight: [C, O / groups, *kernel] (the weight of the convolution whose adjoint this is, as in
        `torch.nn.functional.conv_transpose3d`).
        bias: [O] or None.
        stride, padding, padding_mode, dilation, groups: of that convolution.
        output_padding: rows of the result beyond the smallest that fits, per axis, in [0, stride).
        memory_format: as in `conv_nd`.

    Under autocast, as `F.conv_transpose3d`: x, weight and bias are cast to the autocast dtype (float64 stays).

    Returns:
        y [B, O, *out] or [O, *out], out = (size - 1) stride - 2 padding + dilation (kernel - 1) + 1 + output_padding.

    Raises:
        TypeError, ValueError: as `conv_nd`.
    """
    if autocast.anywhere():
        x, weight, bias = autocast.lower_precision(x, weight, bias)
    try:
        y = builtin.serve(
            x, weight, bias, stride, padding, padding_mode, dilation, groups, memory_format, None, output_padding
        )
    except (RuntimeError, TypeError, ValueError):
        check_transposed_arguments(
            x, weight, bias, stride, padding, output_padding, padding_mode, dilation, groups
        )  # fmt: skip
        raise
    if y is not None:
        return y
    if unbatched(x, weight):
        y = conv_transpose_nd(
            x.unsqueeze(0), weight, bias, stride=stride, padding=padding, output_padding=output_padding,
            padding_mode=padding_mode, dilation=dilation, groups=groups, memory_format=memory_format,
        )  # fmt: skip
        return y.squeeze(0)
    geometry, size = check_transposed_arguments(
        x, weight, bias, stride, padding, output_padding, padding_mode, dilation, groups
    )
    if registry.reference_selected():
        y = autocast.reference(reference.conv_transpose_nd, x, weight, bias, geometry, size)
        return arrange(y, x, weight, memory_format)
    y = torch.ops.astrobiogen.conv_transpose_nd(x, weight, bias, *schema_lists(geometry), size)
    return arrange(y, x, weight, memory_format)


def unbatched(x: object, weight: object) -> bool:
    """True for x [C, *spatial], one axis less than `weight`; what is no tensor is refused later, by name."""
    return isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and x.dim() == weight.dim() - 1 >= 2


def schema_lists(geometry: Geometry) -> tuple[list[int], list[int], list[int], list[int], int]:
    """The geometry as the ops' schemas list it."""
    stride, padding, mode, dilation = map(list, (geometry.stride, geometry.padding, geometry.mode, geometry.dilation))
    return stride, padding, mode, dilation, geometry.groups


def empty_channel_last(like: torch.Tensor, channels: int, spatial: Sequence[int]) -> torch.Tensor:
    """An empty [B, `channels`, *spatial] like `like`, channels innermost."""
    return like.new_empty(like.shape[0], *spatial, channels).movedim(-1, 1)


# The functions below take their geometry as the schema lists it: stride, padding, mode, dilation, groups.


def _fake_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    del bias
    *lists, _, keep = options
    out = Geometry.of(*lists).output_size(x.shape[2:], weight.shape[2:])
    y = empty_channel_last(x, weight.shape[0], out)
    return y, empty_channel_last(x, weight.shape[0], out) if keep else x.new_empty(0)


def _fake_transpose(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> torch.Tensor:
    del bias
    *_, groups, size = options
    return empty_channel_last(x, weight.shape[1] * groups, size)


def _fake_weight_grad(grad: torch.Tensor, x: torch.Tensor, kernel: list[int], *lists: Any) -> torch.Tensor:
    return x.new_empty(grad.shape[1], x.shape[1] // Geometry.of(*lists).groups, *kernel)


def _fake_bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[1])


def conv_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Sequence[Any], needed: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the convolution's x, weight and bias, None where not `needed`; `geometry` as the schema lists it."""
    ops = torch.ops.astrobiogen
    grad_x = ops.conv_transpose_nd(grad, weight, None, *geometry, x.shape[2:]) if needed[0] else None
    grad_weight = ops.conv_nd_weight_grad(grad, x, weight.shape[2:], *geometry) if needed[1] else None
    return grad_x, grad_weight, ops.conv_nd_bias_grad(grad) if needed[2] else None


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, *geometry, activation, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.geometry, ctx.activation, ctx.keep = geometry, activation, keep
    ctx.save_for_backward(x, weight, output[1])


def _backward_conv(ctx: Any, grad: torch.Tensor | None, grad_kept: torch.Tensor | None) -> tuple[Any, ...]:
    x, weight, kept = ctx.saved_tensors
    if ctx.activation != 0 and not ctx.keep:
        raise RuntimeError("astrobiogen::conv_nd was called with keep=False and an activation, so it has no gradient")
    if grad is not None and ctx.activation == ACTIVATIONS.index("silu"):
        grad = torch.ops.aten.silu_backward(grad, kept)
    elif grad is not None and ctx.activation == ACTIVATIONS.index("gelu"):
        grad = torch.ops.aten.gelu_backward(grad, kept)
    if ctx.keep and grad_kept is not None:
        grad = grad_kept if grad is None else grad + grad_kept
    nothing = (None,) * 7
    if grad is None:
        return None, None, None, *nothing
    return *conv_gradients(grad, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), *nothing


def _setup_transpose(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    x, weight, _, *geometry, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.geometry = geometry
    ctx.save_for_backward(x, weight)


def _backward_transpose(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if grad is None:
        return None, None, None, *nothing
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    ops, geometry = torch.ops.astrobiogen, ctx.geometry
    grad_x = ops.conv_nd(grad, weight, None, *geometry, 0, False)[0] if need_x else None
    grad_weight = ops.conv_nd_weight_grad(x, grad, weight.shape[2:], *geometry) if need_weight else None
    return grad_x, grad_weight, ops.conv_nd_bias_grad(grad) if need_bias else None, *nothing


def _setup_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    grad, x, _, *geometry = inputs
    ctx.set_materialize_grads(False)
    ctx.geometry = geometry
    ctx.save_for_backward(grad, x)


def _backward_weight_grad(ctx: Any, grad_weight: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if grad_weight is None:
        return None, None, *nothing
    grad, x = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    ops = torch.ops.astrobiogen
    grad_grad = ops.conv_nd(x, grad_weight, None, *ctx.geometry, 0, False)[0] if need_grad else None
    grad_x = ops.conv_transpose_nd(grad, grad_weight, None, *ctx.geometry, x.shape[2:]) if need_x else None
    return grad_grad, grad_x, *nothing


def _setup_bias_grad(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    del output
    ctx.shape = inputs[0].shape


def _backward_bias_grad(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)


GEOMETRY_SCHEMA = "int[] stride, int[] padding, int[] mode, int[] dilation, int groups"

registry.define(
    f"conv_nd(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY_SCHEMA}, int activation, bool keep) -> (Tensor, Tensor)",
    operands="x: float B C *size; weight: x O D *kernel; bias: x O",
    also=raw.check_conv,
    reference=reference.conv_nd_op,
    fake=_fake_conv,
    triton=f"{_TRITON}:conv_nd",
    cpu_rule=_PUBLIC_RULE,
)
registry.define(
    f"conv_transpose_nd(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY_SCHEMA}, SymInt[] size) -> Tensor",
    operands="x: float B C *out; weight: x C D *kernel; bias: x O",
    also=raw.check_transpose,
    reference=reference.conv_transpose_nd_op,
    fake=_fake_transpose,
    triton=f"{_TRITON}:conv_transpose_nd",
    cpu_rule=_PUBLIC_RULE,
)
registry.define(
    f"conv_nd_weight_grad(Tensor grad, Tensor x, SymInt[] kernel, {GEOMETRY_SCHEMA}) -> Tensor",
    operands="x: float B C *size; grad: x B O *out",
    also=raw.check_weight_grad,
    reference=reference.conv_nd_weight_grad_op,
    fake=_fake_weight_grad,
    triton=f"{_TRITON}:conv_nd_weight_grad",
    cpu_rule=CPU_RULE,
)
registry.define(
    "conv_nd_bias_grad(Tensor grad) -> Tensor",
    operands="grad: float B O *out",
    reference=reference.conv_nd_bias_grad_op,
    fake=_fake_bias_grad,
    triton=f"{_TRITON}:conv_nd_bias_grad",
)
registry.differentiable("conv_nd", backward=_backward_conv, setup_context=_setup_conv)
registry.differentiable("conv_transpose_nd", backward=_backward_transpose, setup_context=_setup_transpose)
registry.differentiable("conv_nd_weight_grad", backward=_backward_weight_grad, setup_context=_setup_weight_grad)
registry.differentiable("conv_nd_bias_grad", backward=_backward_bias_grad, setup_context=_setup_bias_grad)
