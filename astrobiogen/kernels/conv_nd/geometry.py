"""Index arithmetic of a convolution over N axes: sizes, live taps, and padding as explicit copies.

One definition for the reference, the fake functions and the Triton launchers. Along one axis with size L, kernel K,
stride s, padding p and
dilation d, output o reads the padded position o*s + k*d - p for tap k in [0, K). A tap that leaves [0, L) under zero
padding is *dead*.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

MODES = ("zeros", "circular", "reflect", "replicate", "pole")
ZEROS, CIRCULAR, REFLECT, REPLICATE, POLE = range(5)
ACTIVATIONS = (None, "silu", "gelu")
NORMS = (None, "rms", "layer", "group")
_, RMS, LAYER, GROUP = range(4)
MAX_AXES = 5
# Convolutions of PyTorch, oneDNN and cuDNN stop at three spatial axes; the axes before the last three are looped over.
INNER_AXES = 3


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Stride, padding, padding mode (index into `MODES`) and dilation per axis, and the number of channel groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    mode: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], mode: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Geometry":
        """From the op's argument lists."""
        return cls(tuple(stride), tuple(padding), tuple(mode), tuple(dilation), groups)

    @property
    def halo(self) -> tuple[int, ...]:
        """Rows to copy on both sides of each axis: its padding where the mode is not zeros, else 0."""
        return tuple(0 if mode == ZEROS else pad for mode, pad in zip(self.mode, self.padding))

    def after_halo(self) -> "Geometry":
        """The geometry that is left once the halos were copied: the padding of zero-padded axes only."""
        padding = tuple(pad if mode == ZEROS else 0 for mode, pad in zip(self.mode, self.padding))
        return dataclasses.replace(self, padding=padding, mode=(ZEROS,) * len(padding))

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Spatial size of the convolution's output: floor((L + 2p - d(K - 1) - 1) / s) + 1 per axis."""
        rows = zip(size, kernel, self.stride, self.padding, self.dilation)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows]

    def is_patches(self, kernel: Sequence[int]) -> bool:
        """Whether windows neither overlap nor leave gaps: the convolution is a matrix product of patches."""
        dense = all(step == 1 or taps == 1 for step, taps in zip(self.dilation, kernel, strict=True))
        return tuple(kernel) == self.stride and not any(self.padding) and dense and self.groups == 1

    def transposed_size(self, size: Sequence[int], kernel: Sequence[int], extra: Sequence[int]) -> list[int]:
        """Spatial size of the transposed convolution's output: (L - 1) s - 2p + d(K - 1) + 1 + extra per axis."""
        rows = zip(size, kernel, self.stride, self.padding, self.dilation, extra)
        return [(n - 1) * s - 2 * p + d * (k - 1) + 1 + e for n, k, s, p, d, e in rows]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over channels: `kind` (index into `NORMS`), and for GROUP the number of channel groups. RMS and LAYER
    normalise every position over its channels, GROUP every sample over a group's channels and all positions."""

    kind: int
    groups: int
    eps: float

    def split(self, z: torch.Tensor) -> torch.Tensor:
        """`z` [B, C, *spatial] as [B, groups, C / groups, *spatial], one group for the channel norms."""
        groups = self.groups if self.kind == GROUP else 1
        return z.reshape(z.shape[0], groups, z.shape[1] // groups, *z.shape[2:])

    def reduced(self, split: torch.Tensor) -> tuple[int, ...]:
        """The axes of `split(z)` that are averaged."""
        return tuple(range(2, split.dim())) if self.kind == GROUP else (2,)

    def statistics_shapes(self, shape: Sequence[int], keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of mean and 1 / deviation as the op `conv_nd_norm` returns them for z of `shape` [B, C, *spatial]:
        [B, groups] for GROUP, [B, *spatial] for the others if `keep`; (0,) where there is none."""
        if self.kind == GROUP:
            return (shape[0], self.groups), (shape[0], self.groups)
        if not keep:
            return (0,), (0,)
        every = (shape[0], *shape[2:])
        return every if self.kind == LAYER else (0,), every


def live_range(out: int, size: int, stride: int, shift: int) -> tuple[int, int]:
    """The outputs o in [lo, hi) of [0, out) whose input o * stride + shift lies in [0, size); empty: lo == hi."""
    low = max(0, -(shift // stride))
    high = min(out, (size - 1 - shift) // stride + 1)
    return low, max(low, high)


@dataclasses.dataclass(frozen=True)
class OuterTap:
    """One live combination of taps over the outer axes: its kernel index and the parts of output and input that it
    joins."""

    index: tuple[int, ...]
    output: tuple[slice, ...]
    input: tuple[slice, ...]


def outer_taps(
    geometry: Geometry, size: Sequence[int], out: Sequence[int], kernel: Sequence[int]
) -> Iterator[OuterTap]:
    """The live taps over all axes but the last three, of a geometry without halos."""
    axes = range(len(size) - INNER_AXES)
    for index in itertools.product(*(range(kernel[axis]) for axis in axes)):
        outputs, inputs = [], []
        for axis, tap in zip(axes, index):
            stride = geometry.stride[axis]
            shift = tap * geometry.dilation[axis] - geometry.padding[axis]
            low, high = live_range(out[axis], size[axis], stride, shift)
            outputs.append(slice(low, high))
            inputs.append(slice(low * stride + shift, (high - 1) * stride + shift + 1, stride))
        if all(part.start < part.stop for part in outputs):
            yield OuterTap(index, tuple(outputs), tuple(inputs))


def add_halo(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`x` [B, C, *spatial] with the halo of every axis that is not zero-padded copied to both of its ends."""
    for axis, (mode, pad) in enumerate(zip(geometry.mode, geometry.padding)):
        if mode == ZEROS or pad == 0:
            continue
        dim, size = axis + 2, x.shape[axis + 2]
        if mode == CIRCULAR:
            left, right = x.narrow(dim, size - pad, pad), x.narrow(dim, 0, pad)
        elif mode == REFLECT:
            left, right = x.narrow(dim, 1, pad).flip(dim), x.narrow(dim, size - 1 - pad, pad).flip(dim)
        elif mode == REPLICATE:
            shape = [pad if at == dim else -1 for at in range(x.dim())]
            left, right = x.narrow(dim, 0, 1).expand(shape), x.narrow(dim, size - 1, 1).expand(shape)
        else:
            half = x.shape[dim + 1] // 2
            left = x.narrow(dim, 0, pad).flip(dim).roll(half, dim + 1)
            right = x.narrow(dim, size - pad, pad).flip(dim).roll(half, dim + 1)
        x = torch.cat([left, x, right], dim)
    return x


def fold_halo(grad: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The adjoint of `add_halo`: adds what reached the halo rows to the rows they were copied from. Fixed order, no
    scatter."""
    for axis in reversed(range(len(geometry.mode))):
        mode, pad = geometry.mode[axis], geometry.padding[axis]
        if mode == ZEROS or pad == 0:
            continue
        dim = axis + 2
        size = grad.shape[dim] - 2 * pad
        left, body, right = grad.split([pad, size, pad], dim)
        body = body.clone()
        if mode == CIRCULAR:
            body.narrow(dim, size - pad, pad).add_(left)
            body.narrow(dim, 0, pad).add_(right)
        elif mode == REFLECT:
            body.narrow(dim, 1, pad).add_(left.flip(dim))
            body.narrow(dim, size - 1 - pad, pad).add_(right.flip(dim))
        elif mode == REPLICATE:
            body.narrow(dim, 0, 1).add_(left.sum(dim, keepdim=True))
            body.narrow(dim, size - 1, 1).add_(right.sum(dim, keepdim=True))
        else:
            half = grad.shape[dim + 1] // 2
            body.narrow(dim, 0, pad).add_(left.flip(dim).roll(half, dim + 1))
            body.narrow(dim, size - pad, pad).add_(right.flip(dim).roll(half, dim + 1))
        grad = body
    return grad


def channel_last(x: torch.Tensor) -> torch.Tensor:
    """`x` [B, C, *spatial] with channels innermost in memory; the same tensor where they already are."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
