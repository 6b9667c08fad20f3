"""Inputs that the narrow linear layer must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """x [rows, inputs] times a weight [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int


# The preset "tiny": nodes of a batch of metabolic networks, spectral points, tokens.
BENCHMARK_SIZES = (Size(8256, 32, 64), Size(8256, 64, 32), Size(8256, 8, 32), Size(4096, 32, 64), Size(788, 136, 256))


def layer(*shape: int, outputs: int, bias: bool = False) -> Callable[[TensorMaker], dict[str, Any]]:
    """x [*shape] and a weight [outputs, shape[-1]]."""

    def build(make: TensorMaker) -> dict[str, Any]:
        return {
            "x": make.randn(*shape),
            "weight": make.randn(outputs, shape[-1]),
            "bias": make.randn(outputs) if bias else None,
        }

    return build


def _strided(make: TensorMaker) -> dict[str, Any]:
    """x transposed, the weight a column slice."""
    return {"x": make.randn(40, 130).t(), "weight": make.randn(48, 80)[:, ::2], "bias": None}


def _expanded(make: TensorMaker) -> dict[str, Any]:
    return {"x": make.randn(1, 33).expand(256, 33), "weight": make.randn(24, 33), "bias": make.randn(24)}


_ALL = ("x", "weight", "bias")

CASES = (
    Case("gradcheck", layer(2, 3, 4, outputs=5, bias=True), _ALL, gradcheck=True),
    Case("no_rows", layer(0, 4, outputs=5), ("x", "weight")),
    Case("one_axis", layer(7, outputs=3, bias=True), _ALL),
    Case("narrow", layer(300, 32, outputs=64), ("x", "weight")),
    Case("edges", layer(77, 45, outputs=67, bias=True), _ALL),
    Case("few_inputs", layer(700, 8, outputs=40), ("x", "weight")),
    Case("few_outputs", layer(3300, 40, outputs=1, bias=True), _ALL),
    Case("three_axes", layer(2, 97, 136, outputs=68), ("x", "weight")),
    Case("widest", layer(64, 512, outputs=512), ("x", "weight")),
    Case("wider", layer(70, 520, outputs=16), ("x", "weight")),
    Case("strided", _strided, ("x", "weight")),
    Case("expanded", _expanded, _ALL),
)


def _large_bias(make: TensorMaker) -> dict[str, Any]:
    """A bias that a sum must not begin with: each of its terms would round at the size of the bias."""
    arguments = layer(300, 256, outputs=64, bias=True)(make)
    return arguments | {"bias": arguments["bias"] + 10_000}


# Sums so long, or beside numbers so large, that an order of additions shows.
LONG_CASES = (
    Case("long_rows", layer(60_000, 8, outputs=16, bias=True), _ALL),
    Case("large_bias", _large_bias, _ALL),
)
