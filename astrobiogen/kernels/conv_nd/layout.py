"""What the public functions add around the ops: the memory layout of the result, and padding given by a word."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from astrobiogen.kernels.conv_nd.geometry import ZEROS, Geometry, add_halo, channel_last

MemoryFormat = Literal["channels_last", "preserve"]
MEMORY_FORMATS = ("channels_last", "preserve")
PADDINGS = ("same", "valid")


def arrange(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, memory_format: MemoryFormat) -> torch.Tensor:
    """The result `y` [B, O, *out], dense in either layout, in the one that was asked for; "preserve": channels
    innermost where they are in `x` or in `weight`, as PyTorch's convolutions decide, else contiguous.

    Raises:
        ValueError: `memory_format` is neither of the two.
    """
    if memory_format == "preserve":
        if (x.is_contiguous() and weight.is_contiguous()) or not (is_channel_last(x) or is_channel_last(weight)):
            return y.contiguous()
    elif memory_format != "channels_last":
        raise ValueError(f"memory_format must be one of {MEMORY_FORMATS}, got {memory_format!r}")
    return y if y.stride(1) == 1 else channel_last(y)


def is_channel_last(tensor: torch.Tensor) -> bool:
    """Whether channels are innermost in memory, and not merely because every other order is the same."""
    return not tensor.is_contiguous() and tensor.stride(1) == 1 and tensor.shape[1] > 1


def numbers(
    padding: int | Sequence[int] | str, weight: torch.Tensor, dilation: int | Sequence[int]
) -> int | Sequence[int]:
    """`padding` as numbers: for "same" the longer side of each axis, which reaches dilation · (kernel − 1) / 2 rows,
    rounded up.

    Raises:
        ValueError: an unknown word.
    """
    if not isinstance(padding, str) or not isinstance(weight, torch.Tensor):
        return padding  # type: ignore[return-value]
    if padding not in PADDINGS:
        raise ValueError(f"padding must be integers or one of {PADDINGS}, got {padding!r}")
    if padding == "valid":
        return 0
    kernel = weight.shape[2:]
    steps = list(dilation) if isinstance(dilation, Iterable) else [dilation] * len(kernel)
    return [(step * (taps - 1) + 1) // 2 for step, taps in zip(steps, kernel)]


def same_size(x: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[torch.Tensor, Geometry]:
    """(x, geometry) whose convolution has the size of `x`, from the `geometry` of `numbers`: an odd number of rows in
    all puts one more at the end of the axis, as PyTorch does.

    Raises:
        ValueError: the stride is not 1.
    """
    if any(step != 1 for step in geometry.stride):
        raise ValueError(f"stride must be 1 for padding='same', got {geometry.stride}")
    odd = [step * (taps - 1) % 2 for step, taps in zip(geometry.dilation, kernel)]
    if not any(odd):
        return x, geometry
    x = add_halo(x, geometry)  # all of them: a pole reads the size of the axis behind it
    ends: list[int] = []
    for axis, (extra, mode) in enumerate(zip(odd, geometry.mode)):
        if extra and mode != ZEROS:
            x = x.narrow(axis + 2, 1, x.shape[axis + 2] - 1)
        ends = [0, extra if mode == ZEROS else 0, *ends]
    padding = tuple(
        pad - extra if mode == ZEROS else 0 for pad, extra, mode in zip(geometry.padding, odd, geometry.mode)
    )
    return F.pad(x, ends), dataclasses.replace(geometry, padding=padding, mode=(ZEROS,) * len(padding))
