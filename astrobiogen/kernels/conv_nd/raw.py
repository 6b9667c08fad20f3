"""What the convolution's Triton launchers demand beside the shapes of single tensors: lists, sizes, words."""

from collections.abc import Sequence
from typing import Any

import torch

from astrobiogen.kernels.checks import INT32_SAFE, check_int
from astrobiogen.kernels.conv_nd.arguments import check_axes
from astrobiogen.kernels.conv_nd.geometry import ACTIVATIONS, GROUP, MAX_AXES, MODES, NORMS, RMS, Geometry


def check_conv(x: torch.Tensor, weight: torch.Tensor, bias: Any, *options: Any) -> None:
    """Of `conv_nd` (behind its lists: activation, keep) and `conv_nd_norm` (norm, groups, eps, activation, keep)."""
    lists = options[:5] if len(options) == 7 else options[2:7]
    del bias
    geometry = _geometry(lists, x.dim() - 2)
    _check_weight(x, weight, geometry.groups)
    _expect("x.shape[1]", x.shape[1], weight.shape[1] * geometry.groups)
    check_axes(geometry, x.shape[2:], weight.shape[2:])
    check_int("activation", options[-2], 0, len(ACTIVATIONS) - 1)
    if len(options) > 7:
        _check_norm(weight.shape[0], options[7], options[8])


def check_transpose(x: torch.Tensor, weight: torch.Tensor, bias: Any, *options: Any) -> None:
    """Of `conv_transpose_nd`."""
    *lists, size = options
    geometry = _geometry(lists, x.dim() - 2)
    _check_weight(x, weight, geometry.groups)
    if bias is not None:
        _expect("bias.shape[0]", bias.shape[0], weight.shape[1] * geometry.groups)
    _expect("len(size)", len(size), x.dim() - 2)
    _check_output(geometry, size, weight.shape[2:], x.shape[2:])


def check_weight_grad(grad: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], *lists: Any) -> None:
    """Of `conv_nd_weight_grad`."""
    axes = x.dim() - 2
    geometry = _geometry(lists, axes)
    _expect("grad.dim()", grad.dim(), x.dim())
    _expect("len(kernel)", len(kernel), axes)
    for name, channels in (("x", x.shape[1]), ("grad", grad.shape[1])):
        if channels < 1 or channels % geometry.groups:
            raise ValueError(f"groups = {geometry.groups} must divide the channels of {name}, got {channels}")
    _check_output(geometry, x.shape[2:], kernel, grad.shape[2:])


def check_norm_backward(grad: torch.Tensor, kept: torch.Tensor, *options: Any) -> None:
    """Of `conv_nd_norm_backward`."""
    _, _, mean, rstd, norm, groups, activation = options
    del grad
    if not 1 <= kept.dim() - 2 <= MAX_AXES:
        raise ValueError(f"kept must have 1 to {MAX_AXES} spatial axes, got {tuple(kept.shape)}")
    _check_norm(kept.shape[1], norm, groups)
    check_int("activation", activation, 0, len(ACTIVATIONS) - 1)
    expected = (kept.shape[0], groups) if norm == GROUP else (kept.shape[0], *kept.shape[2:])
    for name, statistic in (("rstd", rstd), *((("mean", mean),) if norm != RMS else ())):
        if tuple(statistic.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(statistic.shape)}")


def _geometry(lists: Sequence[Any], axes: int) -> Geometry:
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(f"x must have 1 to {MAX_AXES} spatial axes, got {axes}")
    *words, groups = lists
    for name, numbers, lowest, highest in zip(
        ("stride", "padding", "mode", "dilation"),
        words,
        (1, 0, 0, 1),
        (INT32_SAFE, INT32_SAFE, len(MODES) - 1, INT32_SAFE),
    ):
        _expect(f"len({name})", len(numbers), axes)
        for number in numbers:
            check_int(f"every {name}", number, lowest, highest)
    check_int("groups", groups, 1)
    stride, padding, mode, dilation = map(tuple, words)
    return Geometry(stride, padding, mode, dilation, groups)


def _check_weight(x: torch.Tensor, weight: torch.Tensor, groups: int) -> None:
    _expect("weight.dim()", weight.dim(), x.dim())
    if min(*weight.shape[:2], x.shape[1]) < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups = {groups} must divide the weight's first axis, got {tuple(weight.shape)}")


def _check_norm(channels: int, norm: int, groups: int) -> None:
    check_int("norm", norm, 1, len(NORMS) - 1)
    check_int("norm_groups", groups, 1, channels if norm == GROUP else 1)
    if channels % groups:
        raise ValueError(f"norm_groups = {groups} must divide the output channels, got {channels}")


def _check_output(geometry: Geometry, size: Sequence[int], kernel: Sequence[int], out: Sequence[int]) -> None:
    check_axes(geometry, size, kernel)
    rows = zip(size, kernel, geometry.padding, geometry.dilation, geometry.stride, out)
    for length, taps, pad, dilation, stride, got in rows:
        _expect("a size of the output", got, (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1)


def _expect(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{name} must be {expected}, got {got}")
