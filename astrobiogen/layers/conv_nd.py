"""Convolution over one to five spatial axes as a module."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int, check_ints
from astrobiogen.kernels.conv_nd.layout import PADDINGS, MemoryFormat
from astrobiogen.kernels.conv_nd.op import Activation, Padding, PaddingMode


class ConvNd(nn.Module):
    """Convolution over `n_axes` spatial axes, 1 to 5: x [B, C, *spatial] -> [B, O, *out], or without the batch axis,
    optional activation fused behind it.

    out = floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1 per axis. State dict and initialisation
    are those of `torch.nn.Conv1d` to `Conv3d` (`weight` [O, C/groups, *kernel], `bias` [O]); four and five axes have
    no PyTorch counterpart.

    The result has the memory layout that came in, as with PyTorch's convolutions: channels-last where `x` is or the
    weight was made so (`module.to(memory_format=torch.channels_last)`), else contiguous. The kernels work on
    channels-last memory, so a chain of layers over a contiguous `x` copies twice per layer; with `memory_format=
    "channels_last"`, or a channels-last `x`, only the first layer copies.

    Args:
        n_axes: number of spatial axes.
        in_channels: C.
        out_channels: O.
        kernel_size: an int or one per axis.
        stride: an int or one per axis.
        padding: an int or one per axis, on both sides; "valid" (none), or "same" with stride 1: the size stays, and of
            an odd number of rows the end of the axis takes one more.
        dilation: an int or one per axis.
        groups: divides C and O.
        bias: add a bias per output channel.
        padding_mode: a word or one per axis: "zeros", "circular", "replicate", "reflect", and "pole" as `ops.conv_nd`
            takes it.
        activation: None, "silu" or "gelu", applied to the result.
        memory_format: "preserve", or "channels_last" for a result with channels innermost in memory, as `ops.conv_nd`.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes do not fit; from `forward`, as `ops.conv_nd`.
    """

    def __init__(
        self,
        n_axes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
        activation: Activation = None,
        *,
        memory_format: MemoryFormat = "preserve",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= n_axes <= 5:
            raise ValueError(f"n_axes must be 1 to 5, got {n_axes}")
        self.n_axes = check_int("n_axes", n_axes, 1)
        self.in_channels = check_int("in_channels", in_channels, 1)
        self.out_channels = check_int("out_channels", out_channels, 1)
        self.groups = check_int("groups", groups, 1)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups = {groups} must divide in_channels = {in_channels} and out_channels = {out_channels}"
            )
        self.kernel_size = check_ints("kernel_size", kernel_size, self.n_axes, 1)
        self.stride = check_ints("stride", stride, self.n_axes, 1)
        self.padding: Padding = self._padding(padding)
        self.dilation = check_ints("dilation", dilation, self.n_axes, 1)
        self.padding_mode: PaddingMode | tuple[PaddingMode, ...] = (
            padding_mode if isinstance(padding_mode, str) else tuple(padding_mode)
        )
        self.activation: Activation = activation
        self.memory_format: MemoryFormat = memory_format
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _padding(self, padding: Padding) -> Padding:
        if not isinstance(padding, str):
            return check_ints("padding", padding, self.n_axes, 0)
        if padding not in PADDINGS:
            raise ValueError(f"padding must be integers or one of {PADDINGS}, got {padding!r}")
        if padding == "same" and max(self.stride) > 1:
            raise ValueError(f"padding='same' keeps the size and needs stride 1, got stride = {self.stride}")
        return padding

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(fan_in) for weight and bias, as PyTorch's convolutions do."""
        bound = 1.0 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x` [B, C, *spatial] or [C, *spatial]."""
        return ops.conv_nd(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            padding_mode=self.padding_mode,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            memory_format=self.memory_format,
        )

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults, for `print(module)`."""
        ones, told = (1,) * self.n_axes, [f"{self.n_axes} axes, {self.in_channels}, {self.out_channels}"]
        told += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        defaults = {
            "padding": (0,) * self.n_axes, "dilation": ones, "groups": 1, "padding_mode": "zeros", "activation": None,
            "memory_format": "preserve",
        }  # fmt: skip
        told += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(told + (["bias=False"] if self.bias is None else []))


class _FixedAxes(ConvNd):
    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
        activation: Activation = None,
        *,
        memory_format: MemoryFormat = "preserve",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            self.axes,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            activation,
            memory_format=memory_format,
            device=device,
            dtype=dtype,
        )


class Conv1d(_FixedAxes):
    """`ConvNd` with one spatial axis: the arguments of `torch.nn.Conv1d`, and `ConvNd`'s activation and layout."""

    axes = 1


class Conv2d(_FixedAxes):
    """`ConvNd` with two spatial axes: the arguments of `torch.nn.Conv2d`, and `ConvNd`'s activation and layout."""

    axes = 2


class Conv3d(_FixedAxes):
    """`ConvNd` with three spatial axes: the arguments of `torch.nn.Conv3d`, and `ConvNd`'s activation and layout."""

    axes = 3


class Conv4d(_FixedAxes):
    """`ConvNd` with four spatial axes: the arguments of `torch.nn.Conv3d`, and `ConvNd`'s activation and layout."""

    axes = 4


class Conv5d(_FixedAxes):
    """`ConvNd` with five spatial axes: the arguments of `torch.nn.Conv3d`, and `ConvNd`'s activation and layout."""

    axes = 5
