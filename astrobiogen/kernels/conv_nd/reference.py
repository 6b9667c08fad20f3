"""Convolution over one to five axes in plain PyTorch: the definition that the kernels are held to.

y[b, o, q] = act( bias[o] + sum over c in the group of o, k in the kernel of  weight[o, c, k] * P(x)[b, c, q*stride +
k*dilation - padding] )

P extends x beyond its ends by the padding mode of each axis. Windows that do not overlap (stride = kernel, no padding)
are one matrix product over patches. Otherwise the sum runs as a loop over the taps of all axes but the
last three, each tap
one `torch.convolution` with channels innermost on the rows that the tap can reach; taps that only touch zero padding
are skipped.
Sums over outer taps are kept in fp32 for half precision.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from astrobiogen.kernels.conv_nd.geometry import (
    ACTIVATIONS,
    INNER_AXES,
    RMS,
    Geometry,
    Norm,
    add_halo,
    channel_last,
    fold_halo,
    live_range,
    outer_taps,
)


def conv_nd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, activation: str | None
) -> torch.Tensor:
    """y [B, O, *out] from x [B, C, *spatial] and weight [O, C / groups, *kernel]; differentiable any number of
    times."""
    return _activate(_convolve(x, weight, bias, geometry), activation).to(x.dtype)


def conv_transpose_nd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, size: list[int]
) -> torch.Tensor:
    """The adjoint of x -> conv_nd(x) (without bias), plus `bias`: y [B, O, *size] from x [B, C, *in], weight [C, O /
    groups, *kernel]."""
    inner = geometry.after_halo()
    padded = [n + 2 * halo for n, halo in zip(size, geometry.halo)]
    total = fold_halo(_transpose_padded(x, weight, inner, padded), geometry)
    if bias is not None:
        total = total + bias.to(total.dtype).reshape(-1, *[1] * len(size))
    return channel_last(total.to(x.dtype))


def conv_nd_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    geometry: Geometry,
    norm: Norm,
    activation: str | None,
) -> torch.Tensor:
    """act(norm(conv_nd(x))); differentiable any number of times. Half precision is normalised in fp32."""
    z = _accumulated(_convolve(x, weight, bias, geometry))
    return _activate(_scale(_statistics(z, norm)[0], norm_weight, norm_bias), activation).to(x.dtype)


# The ops below take their geometry as the schema lists it: stride, padding, mode, dilation, groups.


def conv_nd_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `conv_nd`: y, and what went into the activation if `keep` (else an empty tensor). `keep` needs an
    activation."""
    *lists, activation, keep = options
    total = _convolve(x, weight, bias, Geometry.of(*lists))
    y = channel_last(_activate(total, ACTIVATIONS[activation]).to(x.dtype))
    kept = channel_last(total.to(x.dtype)) if keep else x.new_empty(0)
    return y, kept


def conv_nd_norm_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `conv_nd_norm`: y, and for the backward z, mean and 1 / deviation as `norm.statistics_shape` says."""
    *lists, kind, groups, eps, activation, keep = options
    z = _accumulated(_convolve(x, weight, bias, Geometry.of(*lists)))
    norm = Norm(kind, groups, eps)
    hat, mean, rstd = _statistics(z, norm)
    y = channel_last(_activate(_scale(hat, norm_weight, norm_bias), ACTIVATIONS[activation]).to(x.dtype))
    kept = channel_last(z.to(x.dtype)) if keep else x.new_empty(0)
    shapes = norm.statistics_shapes(z.shape, keep)
    mean, rstd = (t.reshape(n).clone() if n != (0,) else z.new_empty(0) for t, n in zip((mean, rstd), shapes))
    return y, kept, mean, rstd


def conv_nd_norm_backward_op(
    grad: torch.Tensor,
    kept: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    kind: int,
    groups: int,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `conv_nd_norm_backward`: gradients of z, of the norm's weight and of its bias. With h = (z - mean) rstd
    and e = d L / d h: dz = rstd (e - mean(e) - h mean(e h)), without mean(e) for an RMS norm."""
    norm = Norm(kind, groups, 0.0)
    z = norm.split(_accumulated(kept))
    stats = [n if axis not in norm.reduced(z) else 1 for axis, n in enumerate(z.shape)]
    rstd = rstd.reshape(stats)
    hat = (z if kind == RMS else z - mean.reshape(stats)) * rstd
    u = _scale(hat.reshape(kept.shape), norm_weight, norm_bias)
    slope = grad.to(u.dtype)
    if activation == ACTIVATIONS.index("silu"):
        slope = torch.ops.aten.silu_backward(slope, u)
    elif activation == ACTIVATIONS.index("gelu"):
        slope = torch.ops.aten.gelu_backward(slope, u)
    inner = norm.split(_scale(slope, norm_weight, None))
    axes = norm.reduced(z)
    result = inner - hat * (inner * hat).mean(axes, keepdim=True)
    if kind != RMS:
        result = result - inner.mean(axes, keepdim=True)
    positions = [axis for axis in range(kept.dim()) if axis != 1]
    grad_weight = (slope * hat.reshape(kept.shape)).sum(positions)
    grad_z = channel_last((result * rstd).reshape(kept.shape).to(kept.dtype))
    return grad_z, grad_weight.to(kept.dtype), slope.sum(positions).to(kept.dtype)


def conv_transpose_nd_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> torch.Tensor:
    """The op `conv_transpose_nd`."""
    *lists, size = options
    return conv_transpose_nd(x, weight, bias, Geometry.of(*lists), list(size))


def conv_nd_weight_grad_op(grad: torch.Tensor, x: torch.Tensor, kernel: list[int], *lists: Any) -> torch.Tensor:
    """The op `conv_nd_weight_grad`: sum over b, q of grad[b, o, q] * P(x)[b, c, q*stride + k*dilation - padding], [O,
    C / groups, *kernel]."""
    geometry = Geometry.of(*lists)
    inner = geometry.after_halo()
    padded = add_halo(x, geometry)
    result = x.new_zeros(grad.shape[1], x.shape[1] // geometry.groups, *kernel)
    if len(kernel) <= INNER_AXES:
        return _native_weight_grad(padded, grad, result, inner)
    rows_x, rows_grad = padded.movedim(1, -1).contiguous(), grad.movedim(1, -1).contiguous()
    for tap in outer_taps(inner, padded.shape[2:], grad.shape[2:], kernel):
        part = result[(slice(None), slice(None), *tap.index)]
        part.copy_(_native_weight_grad(_volume(rows_x, tap.input), _volume(rows_grad, tap.output), part, inner))
    return result


def conv_nd_bias_grad_op(grad: torch.Tensor) -> torch.Tensor:
    """The op `conv_nd_bias_grad`: sums over batch and positions, [O]."""
    return grad.sum([axis for axis in range(grad.dim()) if axis != 1])


def _accumulated(z: torch.Tensor) -> torch.Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _statistics(z: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z - mean) / deviation, mean and 1 / deviation over the norm's axes (mean 0 for an RMS norm)."""
    split = norm.split(z)
    axes = norm.reduced(split)
    mean = split.mean(axes, keepdim=True) if norm.kind != RMS else split.new_zeros(())
    rstd = torch.rsqrt((split - mean).square().mean(axes, keepdim=True) + norm.eps)
    return ((split - mean) * rstd).reshape(z.shape), mean, rstd


def _scale(hat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    shape = (-1, *[1] * (hat.dim() - 2))
    if weight is not None:
        hat = hat * weight.to(hat.dtype).reshape(shape)
    return hat if bias is None else hat + bias.to(hat.dtype).reshape(shape)


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    """bias + convolution, in the accumulation dtype where outer taps were summed."""
    inner = geometry.after_halo()
    kernel = weight.shape[2:]
    if len(kernel) > INNER_AXES and geometry.is_patches(kernel):
        return F.linear(_patches(x, kernel), weight.flatten(1), bias).movedim(-1, 1)
    padded = add_halo(x, geometry)
    if len(kernel) <= INNER_AXES:
        return _native(padded, weight, bias, inner)
    rows = padded.movedim(1, -1).contiguous()
    out = inner.output_size(padded.shape[2:], kernel)
    total = rows.new_zeros(
        x.shape[0], *out, weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)
    )  # channels innermost
    for tap in outer_taps(inner, padded.shape[2:], out, kernel):
        volume = _native(_volume(rows, tap.input), weight[(slice(None), slice(None), *tap.index)], None, inner)
        part = total[(slice(None), *tap.output)]
        part.add_(volume.movedim(1, -1).reshape(part.shape))
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.movedim(-1, 1)


def _patches(x: torch.Tensor, kernel: Sequence[int]) -> torch.Tensor:
    """x [B, C, *spatial] in windows side by side, [B, *out, C · Π kernel]; the remainder of an axis is left out."""
    shape = list(x.shape[:2])
    for axis, taps in enumerate(kernel):
        x = x.narrow(2 + axis, 0, x.shape[2 + axis] // taps * taps)
        shape += [x.shape[2 + axis] // taps, taps]
    axes = len(kernel)
    outer, inner = (range(start, 2 + 2 * axes, 2) for start in (2, 3))
    return x.reshape(shape).permute(0, *outer, 1, *inner).flatten(1 + axes)


def _transpose_padded(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, size: list[int]) -> torch.Tensor:
    """The adjoint of the zero-padded convolution, for an input of spatial size `size`."""
    kernel = weight.shape[2:]
    inner = slice(-INNER_AXES, None)
    base = geometry.transposed_size(x.shape[2:], kernel, [0] * len(kernel))
    extra = [n - b for n, b in zip(size, base)][inner]
    if len(kernel) <= INNER_AXES:
        return _native_transpose(x, weight, geometry, extra)
    rows = x.movedim(1, -1).contiguous()
    channels = weight.shape[1] * geometry.groups
    total = rows.new_zeros(x.shape[0], *size, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    for tap in outer_taps(geometry, size, x.shape[2:], kernel):
        tap_weight = weight[(slice(None), slice(None), *tap.index)]
        volume = _native_transpose(_volume(rows, tap.output), tap_weight, geometry, extra)
        part = total[(slice(None), *tap.input)]
        part.add_(volume.movedim(1, -1).reshape(part.shape))
    return total.movedim(-1, 1)


def _volume(rows: torch.Tensor, part: tuple[slice, ...]) -> torch.Tensor:
    """The slice `part` over the outer axes of `rows` [B, *spatial, C], folded into the batch: [B', C, d, h, w],
    channels innermost."""
    cut = rows[(slice(None), *part)]
    return cut.reshape(-1, *cut.shape[-1 - INNER_AXES :]).movedim(-1, 1)


def _layout(x: torch.Tensor) -> torch.Tensor:
    """`x` with channels innermost. One channel has any stride; where it is 1 PyTorch calls the tensor channels-last,
    and oneDNN (3.12, brg_conv_fwd) then reads wrong rows when a stride of 2 or more over the last axis leaves a single
    output. The plain strides are the same memory and take its other kernel."""
    return channel_last(x) if x.shape[1] > 1 else x.reshape(-1).view(x.shape)


def _has_dead_axis(geometry: Geometry, size: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether along one of the last axes every tap of every output lands in the zero padding."""
    parts = (part[-INNER_AXES:] for part in (geometry.stride, geometry.padding, geometry.dilation))
    for n, taps, stride, padding, dilation in zip(size, kernel, *parts):
        out = (n + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        ranges = (live_range(out, n, stride, tap * dilation - padding) for tap in range(taps))
        if all(low == high for low, high in ranges):
            return True
    return False


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    stride, padding, dilation = (part[-INNER_AXES:] for part in (geometry.stride, geometry.padding, geometry.dilation))
    # With a bias, oneDNN's brg_conv_fwd (3.12) reads unmapped memory if every tap over the last axis lands in padding.
    dead = _has_dead_axis(geometry, x.shape[2:], weight.shape[2:])
    y = torch.convolution(
        _layout(x),
        _layout(weight),
        None if dead else bias,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        geometry.groups,
    )
    return y + bias.reshape(-1, *[1] * len(stride)) if dead and bias is not None else y


def _native_transpose(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, extra: list[int]) -> torch.Tensor:
    stride, padding, dilation = (part[-INNER_AXES:] for part in (geometry.stride, geometry.padding, geometry.dilation))
    return torch.convolution(_layout(x), _layout(weight), None, stride, padding, dilation, True, extra, geometry.groups)


def _native_weight_grad(x: torch.Tensor, grad: torch.Tensor, like: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Weight gradient of one `torch.convolution`; `like` gives the weight's shape."""
    stride, padding, dilation = (part[-INNER_AXES:] for part in (geometry.stride, geometry.padding, geometry.dilation))
    mask = [False, True, False]
    tensors = _layout(grad), _layout(x), _layout(like)
    return torch.ops.aten.convolution_backward(
        *tensors, None, stride, padding, dilation, False, [0] * len(stride), geometry.groups, mask
    )[1]


def _activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x) if activation == "gelu" else x
