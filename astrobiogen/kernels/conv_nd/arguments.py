"""Argument checks of `conv_nd` and `conv_transpose_nd`: once, at the public entry, with errors that name the argument
and the axis."""

import dataclasses
from collections.abc import Sequence

import torch

from astrobiogen.kernels.checks import (
    INT32_SAFE,
    check_alike,
    check_float,
    check_int,
    check_ints,
    check_shape,
)
from astrobiogen.kernels.conv_nd.geometry import (
    ACTIVATIONS,
    CIRCULAR,
    GROUP,
    MAX_AXES,
    MODES,
    NORMS,
    POLE,
    REFLECT,
    Geometry,
    Norm,
)

# Strides, paddings and dilations below it can be added up four at a time in int32.
FARTHEST = INT32_SAFE // 4


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    padding_mode: str | Sequence[str],
    dilation: int | Sequence[int],
    groups: int,
    activation: str | None,
) -> Geometry:
    """The geometry of a valid `conv_nd` call; raises TypeError or ValueError as its docstring says."""
    geometry = _check_common(x, weight, stride, padding, padding_mode, dilation, groups)
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"weight must have shape [O, C / groups, *kernel] with C / groups = {x.shape[1]} / {groups}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"weight's {weight.shape[0]} output channels must be a multiple of groups = {groups}")
    _check_bias(x, bias, weight.shape[0])
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_axes(geometry, x.shape[2:], weight.shape[2:])
    return _within_int32(geometry, x.shape[2:], weight.shape[2:])


def check_transposed_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    padding_mode: str | Sequence[str],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Geometry, list[int]]:
    """The geometry and the result's spatial size of a valid `conv_transpose_nd` call; raises TypeError or
    ValueError."""
    geometry = _check_common(x, weight, stride, padding, padding_mode, dilation, groups)
    if x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"weight must have shape [C, O / groups, *kernel] with C = {x.shape[1]}, got {tuple(weight.shape)}"
        )
    if x.shape[1] % groups:
        raise ValueError(f"x's {x.shape[1]} channels must be a multiple of groups = {groups}")
    _check_bias(x, bias, weight.shape[1] * groups)
    extra = check_ints("output_padding", output_padding, x.dim() - 2, 0)
    for axis, (rows, step) in enumerate(zip(extra, geometry.stride)):
        if rows >= step:
            raise ValueError(f"output_padding on spatial axis {axis} must be below the stride {step}, got {rows}")
    _check_transposed_size(geometry, x.shape[2:], weight.shape[2:], extra)
    size = geometry.transposed_size(x.shape[2:], weight.shape[2:], extra)
    for axis, length in enumerate(size):
        if length < 1:
            raise ValueError(
                f"the output on spatial axis {axis} would have size {length}: "
                f"padding {geometry.padding[axis]} is too long"
            )
    check_axes(geometry, size, weight.shape[2:])
    return _within_int32(geometry, size, weight.shape[2:]), size


def check_norm(
    x: torch.Tensor,
    channels: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    groups: int,
    eps: float,
) -> Norm:
    """The norm of a valid `conv_nd_norm` call; raises TypeError or ValueError as its docstring says."""
    if norm not in NORMS[1:]:
        raise ValueError(f"norm must be one of {NORMS[1:]}, got {norm!r}")
    groups = check_int("norm_groups", groups, 1)
    kind = NORMS.index(norm)
    if kind != GROUP and groups != 1:
        raise ValueError(f"norm_groups must be 1 for norm={norm!r}, got {groups}")
    if channels % groups:
        raise ValueError(f"norm_groups = {groups} must divide the {channels} output channels")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps!r}")
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if tensor is not None:
            check_float(name, tensor)
            check_shape(name, tensor, (channels,), "[O], one per output channel")
            check_alike("x", x, name, tensor)
    return Norm(kind, groups, float(eps))


def _check_common(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    padding_mode: str | Sequence[str],
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    check_float("x", x)
    check_float("weight", weight)
    axes = x.dim() - 2
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(
            f"x must be [B, C, *spatial] with 1 to {MAX_AXES} spatial axes, or without B one axis less than the "
            f"weight, got shape {tuple(x.shape)}"
        )
    if weight.dim() != x.dim():
        raise ValueError(
            f"weight must have one kernel size for each of the {axes} spatial axes of x, "
            f"got shape {tuple(weight.shape)}"
        )
    check_alike("x", x, "weight", weight)
    groups = check_int("groups", groups, 1)
    if x.shape[1] < 1 or weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(
            f"x and weight must have at least one channel, got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for axis, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:])):
        if size < 1 or kernel < 1:
            raise ValueError(f"spatial axis {axis} must have size and kernel >= 1, got size {size} and kernel {kernel}")
    return Geometry(
        check_ints("stride", stride, axes, 1),
        check_ints("padding", padding, axes, 0),
        _modes(padding_mode, axes),
        check_ints("dilation", dilation, axes, 1),
        groups,
    )


def _check_bias(x: torch.Tensor, bias: torch.Tensor | None, channels: int) -> None:
    if bias is None:
        return
    check_float("bias", bias)
    check_shape("bias", bias, (channels,), "[O], one per output channel")
    check_alike("x", x, "bias", bias)


def check_axes(geometry: Geometry, size: Sequence[int], kernel: Sequence[int]) -> None:
    """ValueError unless the kernel fits into every padded axis, and its halo into the axis that it copies."""
    rows = zip(size, kernel, geometry.padding, geometry.mode, geometry.dilation)
    for axis, (length, taps, pad, mode, dilation) in enumerate(rows):
        reach = dilation * (taps - 1) + 1
        if min(length, taps) < 1:
            raise ValueError(f"spatial axis {axis} must have size and kernel >= 1, got size {length} and kernel {taps}")
        if reach > length + 2 * pad:
            raise ValueError(
                f"the kernel on spatial axis {axis} reaches over {reach} rows (size {taps}, dilation {dilation}), "
                f"more than the {length + 2 * pad} rows of the padded axis (size {length}, padding {pad})"
            )
        longest = length - 1 if mode == REFLECT else length
        if mode in (CIRCULAR, REFLECT, POLE) and pad > longest:
            raise ValueError(
                f"padding on spatial axis {axis} (size {length}) must be at most {longest} "
                f"in mode {MODES[mode]!r}, got {pad}"
            )
        if mode == POLE and (axis + 1 == len(size) or size[axis + 1] % 2):
            found = "none" if axis + 1 == len(size) else f"one of size {size[axis + 1]}"
            raise ValueError(
                f"padding mode 'pole' on spatial axis {axis} needs a following axis of even size (longitude), "
                f"got {found}"
            )


def _within_int32(geometry: Geometry, size: Sequence[int], kernel: Sequence[int]) -> Geometry:
    """The same convolution with numbers that kernels may add up in int32.

    A step beyond the last position of the kernel is as good as one to just behind it, and the dilation of a single tap
    means nothing. Longer paddings are refused, before an output as long is asked for.
    """
    if max(*geometry.stride, *geometry.padding, *geometry.dilation) < FARTHEST:
        return geometry
    stride, dilation = list(geometry.stride), list(geometry.dilation)
    for axis, (length, taps, pad) in enumerate(zip(size, kernel, geometry.padding)):
        if pad >= FARTHEST:
            raise ValueError(f"padding on spatial axis {axis} must be below {FARTHEST}, got {pad}")
        if taps == 1:
            dilation[axis] = 1
        positions = length + 2 * pad - dilation[axis] * (taps - 1)
        stride[axis] = min(stride[axis], positions)
    return dataclasses.replace(geometry, stride=tuple(stride), dilation=tuple(dilation))


def _check_transposed_size(
    geometry: Geometry, size: Sequence[int], kernel: Sequence[int], extra: Sequence[int]
) -> None:
    """ValueError where the result of a transposed convolution would pass what `_within_int32` allows."""
    for name, numbers in (
        ("stride", [step if rows > 1 else 1 for step, rows in zip(geometry.stride, size)]),
        ("padding", geometry.padding),
        ("dilation", [step if taps > 1 else 1 for step, taps in zip(geometry.dilation, kernel)]),
        ("output_padding", extra),
    ):
        for axis, number in enumerate(numbers):
            if number >= FARTHEST:
                raise ValueError(f"{name} on spatial axis {axis} must be below {FARTHEST}, got {number}")


def _modes(value: str | Sequence[str], axes: int) -> tuple[int, ...]:
    if type(value) is str and value in MODES:
        return (MODES.index(value),) * axes
    words = (value,) * axes if isinstance(value, str) else tuple(value)
    if len(words) != axes:
        raise ValueError(f"padding_mode must be one word or one per spatial axis ({axes}), got {value!r}")
    for axis, word in enumerate(words):
        if word not in MODES:
            raise ValueError(f"padding_mode on spatial axis {axis} must be one of {MODES}, got {word!r}")
    return tuple(MODES.index(word) for word in words)
