"""Convolution over one to five spatial axes as a module."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.conv_nd.op import Activation, PaddingMode
from astrobiogen.layers._autocast import autocast_tensors


class ConvNd(nn.Module):
    """Convolution over `n_axes` spatial axes, 1 to 5: x [B, C, *spatial] -> [B, O, *out], optional activation fused
    behind it.

    out = floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1 per axis. State dict and initialisation
    are those of `torch.nn.Conv1d` to `Conv3d` (`weight` [O, C/groups, *kernel], `bias` [O]); four and five axes have
    no PyTorch counterpart.

    Args:
        n_axes: number of spatial axes.
        in_channels: C.
        out_channels: O.
        kernel_size: an int or one per axis.
        stride: an int or one per axis.
        padding: an int or one per axis, on both sides.
        dilation: an int or one per axis.
        groups: divides C and O.
        bias: add a bias per output channel.
        padding_mode: a word or one per axis: "zeros", "circular", "replicate", "reflect", and "pole" as `ops.conv_nd`
            takes it.
        activation: None, "silu" or "gelu", applied to the result.

    Raises:
        ValueError: sizes do not fit; from `forward`, as `ops.conv_nd`.
    """

    def __init__(
        self,
        n_axes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode | Sequence[PaddingMode] = "zeros",
        activation: Activation = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= n_axes <= 5:
            raise ValueError(f"n_axes must be 1 to 5, got {n_axes}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups = {groups} must divide in_channels = {in_channels} and out_channels = {out_channels}"
            )
        self.n_axes = n_axes
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _per_axis("kernel_size", kernel_size, n_axes)
        self.stride = _per_axis("stride", stride, n_axes)
        self.padding = _per_axis("padding", padding, n_axes)
        self.dilation = _per_axis("dilation", dilation, n_axes)
        self.groups = groups
        self.padding_mode: PaddingMode | tuple[PaddingMode, ...] = (
            padding_mode if isinstance(padding_mode, str) else tuple(padding_mode)
        )
        self.activation: Activation = activation
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(fan_in) for weight and bias, as PyTorch's convolutions do."""
        bound = 1.0 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x` [B, C, *spatial]."""
        x, weight, bias = autocast_tensors(x, self.weight, self.bias)
        return ops.conv_nd(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            padding_mode=self.padding_mode,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return (
            f"{self.n_axes} axes, {self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_mode={self.padding_mode}, activation={self.activation}"
        )


class Conv4d(ConvNd):
    """`ConvNd` with four spatial axes."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], **options: object
    ) -> None:
        super().__init__(4, in_channels, out_channels, kernel_size, **options)  # pyright: ignore[reportArgumentType]


class Conv5d(ConvNd):
    """`ConvNd` with five spatial axes."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], **options: object
    ) -> None:
        super().__init__(5, in_channels, out_channels, kernel_size, **options)  # pyright: ignore[reportArgumentType]


def _per_axis(name: str, value: int | Sequence[int], n_axes: int) -> tuple[int, ...]:
    values = (value,) * n_axes if isinstance(value, int) else tuple(value)
    if len(values) != n_axes:
        raise ValueError(f"{name} must be an int or {n_axes} ints, got {value!r}")
    if min(values) < (0 if name == "padding" else 1):
        raise ValueError(f"{name} must not be {'negative' if name == 'padding' else 'below 1'}, got {value!r}")
    return values
