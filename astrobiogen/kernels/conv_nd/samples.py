"""Inputs that the convolution ops must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.conv_nd.geometry import MODES, Geometry

ARGUMENTS = ("x", "weight", "bias")


@dataclasses.dataclass(frozen=True)
class Size:
    """One layer: batch 1, stride 1, kernel odd and padded to keep the spatial shape, the last axis circular."""

    name: str
    channels: int
    outputs: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]

    def modes(self) -> tuple[str, ...]:
        """Padding mode per axis."""
        return ("zeros",) * (len(self.spatial) - 1) + ("circular",)

    def padding(self) -> tuple[int, ...]:
        """Half of each kernel size."""
        return tuple(taps // 2 for taps in self.kernel)

    def geometry(self) -> Geometry:
        """As the ops take it."""
        ones = (1,) * len(self.spatial)
        return Geometry(ones, self.padding(), tuple(MODES.index(mode) for mode in self.modes()), ones, 1)


# Axes: month, geological epoch, level, latitude, longitude. "stem" and "wide" are a 5-D network's first and inner
# layers; "space" and "time" are the
# factorised pair (1,1,3,3,3) + (3,1,1,1,1).
BENCHMARK_SIZES = (
    Size("narrow", 16, 16, (12, 4, 10, 16, 32), (3, 3, 3, 3, 3)),
    Size("stem", 2, 128, (12, 1, 10, 32, 64), (3, 3, 3, 3, 3)),
    Size("wide", 128, 128, (4, 2, 6, 16, 32), (3, 3, 3, 3, 3)),
    Size("space", 128, 128, (4, 2, 6, 16, 32), (1, 1, 3, 3, 3)),
    Size("time", 128, 128, (4, 2, 6, 16, 32), (3, 1, 1, 1, 1)),
)


def _dense(
    channels: int,
    outputs: int,
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    batch: int = 1,
    bias: bool = True,
    groups: int = 1,
    **options: Any,
) -> Callable[[TensorMaker], dict[str, Any]]:
    def build(make: TensorMaker) -> dict[str, Any]:
        x = make.randn(batch, channels, *spatial)
        weight = make.randn(outputs, channels // groups, *kernel)
        return {"x": x, "weight": weight, "bias": make.randn(outputs) if bias else None, "groups": groups, **options}

    return build


def _strided(make: TensorMaker) -> dict[str, Any]:
    """Every second channel of a wider, transposed tensor; the weight too."""
    x = make.randn(1, 5, 4, 3, 4).transpose(2, 4)[:, :, :, :, ::2][:, :, ::2]
    weight = make.randn(3, 2, 10, 2, 3).transpose(1, 2)[:, ::2, :, :, :].contiguous().transpose(3, 4)
    return {"x": x, "weight": weight, "bias": make.randn(6)[::2], "padding": 1}


def _expanded(make: TensorMaker) -> dict[str, Any]:
    x = make.randn(1, 1, 2, 5, 1).expand(1, 3, 2, 5, 6)
    weight = make.randn(8, 1, 3, 3, 1).expand(8, 3, 3, 3, 3)
    return {"x": x, "weight": weight, "bias": make.randn(1).expand(8), "padding": 1, "padding_mode": "circular"}


def _channel_last(make: TensorMaker) -> dict[str, Any]:
    x = make.randn(2, 3, 4, 6, 4).movedim(-1, 1)
    return {"x": x, "weight": make.randn(8, 4, 3, 3, 3), "bias": None, "padding": (0, 1, 1), "activation": "silu"}


def _patches(make: TensorMaker) -> dict[str, Any]:
    """Stride = kernel, an axis with a remainder, channels innermost."""
    x = make.randn(2, 4, 3, 7, 3).movedim(-1, 1)
    return {"x": x, "weight": make.randn(19, 3, 2, 3, 2), "bias": make.randn(19), "stride": (2, 3, 2)}


_MIXED = ("circular", "replicate", "zeros", "pole", "circular")
_NO_BIAS = ("x", "weight")

CASES = (
    Case("empty", _dense(2, 3, (2, 2, 2, 3, 4), (1, 2, 1, 3, 3), batch=0, padding=(0, 0, 0, 1, 1)), ARGUMENTS),
    Case("size-1", _dense(1, 1, (1, 1, 1, 1, 1), (3, 3, 3, 3, 3), padding=1), ARGUMENTS),
    Case(
        "size-1-wide",
        _dense(2, 16, (1, 1, 1, 2, 3), (1, 3, 3, 3, 3), padding=(0, 1, 1, 1, 1)),
        ARGUMENTS,
        interpret=False,
    ),
    Case("odd-1d", _dense(3, 5, (17,), (5,), batch=2, padding=2, stride=3, activation="gelu"), ARGUMENTS),
    Case("odd-2d", _dense(6, 9, (7, 11), (3, 2), groups=3, dilation=(2, 1), padding=(2, 1)), ARGUMENTS),
    Case("depthwise", _dense(3, 3, (2, 4, 5), (3, 3, 3), groups=3, padding=1, padding_mode="reflect"), ARGUMENTS),
    Case("strided", _strided, ARGUMENTS),
    Case("expanded", _expanded, ARGUMENTS),
    Case("channel-last", _channel_last, _NO_BIAS),
    Case("patches", _patches, ARGUMENTS),
    Case(
        "patches-5d",
        _dense(2, 33, (4, 1, 2, 4, 12), (2, 1, 2, 2, 4), batch=2, stride=(2, 1, 2, 2, 4), activation="silu"),
        ARGUMENTS,
        interpret=False,
    ),
    Case("patches-gradcheck", _dense(2, 3, (4, 3), (2, 3), stride=(2, 3)), ARGUMENTS, gradcheck=True, interpret=False),
    Case(
        "4d-stride",
        _dense(4, 8, (2, 3, 3, 4), (2, 1, 3, 3), stride=(1, 2, 1, 2), padding=(0, 0, 1, 1), bias=False),
        _NO_BIAS,
    ),
    Case(
        "5d-modes",
        _dense(
            2, 16, (3, 2, 3, 4, 6), (3, 3, 2, 3, 3), padding=(1, 1, 0, 1, 1), padding_mode=_MIXED, activation="silu"
        ),
        ARGUMENTS,
        interpret=False,
    ),
    Case(
        "5d-channels",
        _dense(
            17,
            18,
            (2, 1, 2, 2, 3),
            (2, 1, 1, 1, 3),
            padding=(0, 0, 0, 0, 1),
            padding_mode=("zeros",) * 4 + ("circular",),
        ),
        ARGUMENTS,
    ),
    Case(
        "gradcheck-5d",
        _dense(1, 2, (2, 1, 2, 2, 4), (2, 1, 1, 3, 3), padding=(1, 0, 0, 1, 1), padding_mode=_MIXED, activation="gelu"),
        ARGUMENTS,
        gradcheck=True,
    ),
    Case(
        "gradcheck-2d",
        _dense(
            2,
            2,
            (4, 5),
            (2, 3),
            groups=2,
            stride=(2, 1),
            padding=(1, 2),
            dilation=(1, 2),
            padding_mode=("zeros", "reflect"),
        ),
        ARGUMENTS,
        gradcheck=True,
    ),
)

# Sums over so many positions that an order of additions shows.
LONG_CASES = (
    Case("long", _dense(3, 8, (256, 256), (3, 3), padding=1), ARGUMENTS, interpret=False),
    Case("long-1d", _dense(1, 9, (60_000,), (3,), padding=1, activation="silu"), ARGUMENTS, interpret=False),
)


def _transposed(
    channels: int, outputs: int, spatial: tuple[int, ...], kernel: tuple[int, ...], groups: int = 1, **options: Any
) -> Callable[[TensorMaker], dict[str, Any]]:
    def build(make: TensorMaker) -> dict[str, Any]:
        x = make.randn(2, channels, *spatial)
        weight = make.randn(channels, outputs // groups, *kernel)
        return {"x": x, "weight": weight, "bias": make.randn(outputs), "groups": groups, **options}

    return build


TRANSPOSED_CASES = (
    Case("empty", lambda make: {"x": make.randn(0, 2, 3, 3), "weight": make.randn(2, 3, 3, 3), "bias": None}, _NO_BIAS),
    Case("size-1", _transposed(1, 1, (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)), ARGUMENTS),
    Case("stride-1d", _transposed(4, 6, (5,), (3,), groups=2, stride=3, padding=1, output_padding=2), ARGUMENTS),
    Case(
        "replicate-2d", _transposed(2, 3, (3, 3), (3, 2), stride=(2, 1), padding=1, padding_mode="replicate"), ARGUMENTS
    ),
    Case("circular-3d", _transposed(3, 8, (2, 4, 5), (1, 3, 3), padding=(0, 1, 1), padding_mode="circular"), ARGUMENTS),
    Case(
        "5d-modes",
        _transposed(3, 4, (2, 3, 2, 4, 6), (1, 3, 2, 3, 3), padding=(0, 1, 0, 1, 1), padding_mode=_MIXED),
        ARGUMENTS,
        interpret=False,
    ),
    Case(
        "gradcheck-4d",
        _transposed(
            2, 2, (1, 2, 2, 2), (2, 3, 1, 2), stride=(2, 1, 1, 1), padding=(0, 1, 0, 1), padding_mode="replicate"
        ),
        ARGUMENTS,
        gradcheck=True,
        interpret=False,
    ),
)


NORM_GROUPS = {"rms": 1, "layer": 1, "group": 3}
# Channels, outputs, spatial size and batch of `conv_nd_norm`. On the CPU: own kernel (few inputs, pairs of outputs, one
# row), composition (fewer than 8 outputs), empty batch.
NORM_SHAPES = (
    (2, 12, (3, 4, 5), 2),
    (5, 33, (4, 5), 2),
    (3, 9, (7,), 1),
    (3, 6, (2, 2, 3, 4), 2),
    (2, 12, (3, 4), 0),
)


# Many positions: sums that an order of additions shows, and with a common offset statistics that cancel. Own kernel and
# composition on the CPU.
LONG_NORM_SHAPES = ((2, 12, (64, 80), 1), (1, 6, (150, 150), 1))
LONG_NORM_OFFSETS = (0.0, 1000.0)


def norm_case(
    norm: str,
    channels: int,
    outputs: int,
    spatial: tuple[int, ...],
    batch: int = 2,
    activation: str = "silu",
    offset: float = 0.0,
) -> Case:
    """One call of `conv_nd_norm`: kernel 3 and padding 1 on every axis, weight and bias behind the norm, and `offset`
    added to the convolution's bias."""

    def build(make: TensorMaker) -> dict[str, Any]:
        return {
            "x": make.randn(batch, channels, *spatial),
            "weight": make.randn(outputs, channels, *[3] * len(spatial)),
            "bias": make.randn(outputs) + offset,
            "norm_weight": make.randn(outputs),
            "norm_bias": make.randn(outputs),
            "norm": norm,
            "norm_groups": NORM_GROUPS[norm],
            "padding": 1,
            "activation": activation,
        }

    return Case(f"{norm}-{channels}-{outputs}", build, (*ARGUMENTS, "norm_weight", "norm_bias"))


def random_case(seed: int, longest: int = 6, axes: int | None = None, inputs: int | None = None) -> dict[str, Any]:
    """One random valid call of `conv_nd` in fp64, drawn from `seed`: axes of 1 to `longest` rows, kernel, stride,
    dilation, padding and modes, groups. `axes` and `inputs` (channels per group) are drawn too where not given."""
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    drawn, groups = pick(1, 5), pick(1, 3)
    axes = axes or drawn
    few, outputs = pick(1, 3), pick(1, 9)
    inputs = inputs or few
    size = [pick(1, longest) for _ in range(axes)]
    stride, dilation = tuple(pick(1, 3) for _ in range(axes)), tuple(pick(1, 2) for _ in range(axes))
    modes, padding, kernel = [], [], []
    for axis in range(axes):
        mode = MODES[pick(0, 4)]
        if mode == "pole" and (axis + 1 == axes or size[axis + 1] % 2):
            mode = "zeros"
        room = size[axis] - 1 if mode == "reflect" else size[axis]
        pad = pick(0, min(2, room) if mode != "replicate" else 2)
        reach = size[axis] + 2 * pad
        modes.append(mode)
        padding.append(pad)
        kernel.append(pick(1, min(3, 1 + (reach - 1) // dilation[axis])))
    make = TensorMaker(torch.float64, torch.device("cpu"), draw)
    return {
        "x": make.randn(pick(1, 2), inputs * groups, *size),
        "weight": make.randn(outputs * groups, inputs, *kernel),
        "bias": make.randn(outputs * groups),
        "stride": stride,
        "padding": tuple(padding),
        "padding_mode": tuple(modes),
        "dilation": dilation,
        "groups": groups,
        "activation": (None, "silu", "gelu")[pick(0, 2)],
    }
