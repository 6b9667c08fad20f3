"""Transposed convolution over one to five spatial axes as a module."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int, check_ints
from astrobiogen.kernels.conv_nd.layout import MemoryFormat
from astrobiogen.kernels.conv_nd.op import PaddingMode


class ConvTransposeNd(nn.Module):
    """The adjoint of a convolution over `n_axes` spatial axes, 1 to 5: x [B, C, *spatial] -> [B, O, *out], or without
    the batch axis.

    out = (size − 1)·stride − 2·padding + dilation·(kernel − 1) + 1 + output_padding per axis. Arguments after `n_axes`,
    state dict and initialisation are those of `torch.nn.ConvTranspose1d` to `ConvTranspose3d` (`weight`
    [C, O/groups, *kernel], `bias` [O]); four and five axes have no PyTorch counterpart, and neither have the padding
    modes other than zeros: the adjoint of a periodic convolution is periodic.

    Args:
        n_axes: number of spatial axes.
        in_channels: C.
        out_channels: O.
        kernel_size: an int or one per axis.
        stride: an int or one per axis.
        padding: an int or one per axis, of the convolution whose adjoint this is.
        output_padding: rows beyond the smallest result that fits, an int or one per axis, below `stride`.
        groups: divides C and O.
        bias: add a bias per output channel.
        dilation: an int or one per axis.
        padding_mode: a word or one per axis, as `ops.conv_nd` takes it.
        memory_format: as in `ConvNd`.

    Raises:
        TypeError: a size is not an integer.
        ValueError: sizes do not fit; from `forward`, as `ops.conv_transpose_nd`.
    """

    def __init__(
        self,
        n_axes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
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
        self.padding = check_ints("padding", padding, self.n_axes, 0)
        self.output_padding = check_ints("output_padding", output_padding, self.n_axes, 0)
        self.dilation = check_ints("dilation", dilation, self.n_axes, 1)
        self.padding_mode: PaddingMode | tuple[PaddingMode, ...] = (
            padding_mode if isinstance(padding_mode, str) else tuple(padding_mode)
        )
        self.memory_format: MemoryFormat = memory_format
        shape = (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(O/groups · taps) for weight and bias, as PyTorch's transposed convolutions do."""
        bound = 1.0 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x` [B, C, *spatial] or [C, *spatial]."""
        return ops.conv_transpose_nd(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            padding_mode=self.padding_mode,
            dilation=self.dilation,
            groups=self.groups,
            memory_format=self.memory_format,
        )

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults, for `print(module)`."""
        ones, zeros = (1,) * self.n_axes, (0,) * self.n_axes
        told = [f"{self.n_axes} axes, {self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        told.append(f"stride={self.stride}")
        defaults = {
            "padding": zeros, "output_padding": zeros, "dilation": ones, "groups": 1, "padding_mode": "zeros",
            "memory_format": "preserve",
        }  # fmt: skip
        told += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(told + (["bias=False"] if self.bias is None else []))


class _FixedAxes(ConvTransposeNd):
    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            memory_format=memory_format,
            device=device,
            dtype=dtype,
        )


class ConvTranspose1d(_FixedAxes):
    """`ConvTransposeNd` with one spatial axis: the arguments of `torch.nn.ConvTranspose1d`."""

    axes = 1


class ConvTranspose2d(_FixedAxes):
    """`ConvTransposeNd` with two spatial axes: the arguments of `torch.nn.ConvTranspose2d`."""

    axes = 2


class ConvTranspose3d(_FixedAxes):
    """`ConvTransposeNd` with three spatial axes: the arguments of `torch.nn.ConvTranspose3d`."""

    axes = 3


class ConvTranspose4d(_FixedAxes):
    """`ConvTransposeNd` with four spatial axes: the arguments of `torch.nn.ConvTranspose3d`."""

    axes = 4


class ConvTranspose5d(_FixedAxes):
    """`ConvTransposeNd` with five spatial axes: the arguments of `torch.nn.ConvTranspose3d`."""

    axes = 5
