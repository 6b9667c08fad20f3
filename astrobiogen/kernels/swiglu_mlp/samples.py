"""Inputs that the SwiGLU block must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """x [rows, hidden] through a block of `inner` columns."""

    rows: int
    hidden: int
    inner: int


# The preset "tiny": nodes of a batch of metabolic networks, spectral points, tokens.
BENCHMARK_SIZES = (Size(8256, 32, 64), Size(4096, 32, 64), Size(788, 136, 256))


def block(*shape: int, inner: int) -> Callable[[TensorMaker], dict[str, Any]]:
    """x [*shape] and the three weights, scaled so that gates are of order 1."""

    def build(make: TensorMaker) -> dict[str, Any]:
        hidden = shape[-1]
        return {
            "x": make.randn(*shape),
            "gate_weight": make.randn(inner, hidden) / hidden**0.5,
            "up_weight": make.randn(inner, hidden) / hidden**0.5,
            "down_weight": make.randn(hidden, inner) / inner**0.5,
        }

    return build


def _large_gates(make: TensorMaker) -> dict[str, Any]:
    """Gates of some hundreds, where the exponential under- and overflows."""
    arguments = block(200, 32, inner=32)(make)
    return arguments | {"gate_weight": arguments["gate_weight"] * 100}


def _strided(make: TensorMaker) -> dict[str, Any]:
    """x transposed, weights as column slices."""
    arguments = block(200, 24, inner=40)(make)
    arguments["x"] = make.randn(24, 200).t()
    arguments["gate_weight"] = make.randn(40, 48)[:, ::2]
    return arguments


_ALL = ("x", "gate_weight", "up_weight", "down_weight")

CASES = (
    Case("gradcheck", block(2, 3, 4, inner=5), _ALL, gradcheck=True),
    Case("no_rows", block(0, 4, inner=5), _ALL),
    Case("narrow", block(300, 32, inner=64), _ALL),
    Case("edges", block(77, 45, inner=67), _ALL),
    Case("three_axes", block(2, 97, 136, inner=256), _ALL),
    Case("segments", block(1100, 16, inner=24), _ALL),
    Case("long_segments", block(5000, 8, inner=8), _ALL),
    Case("wider", block(20, 32, inner=520), _ALL),
    Case("large_gates", _large_gates, _ALL),
    Case("strided", _strided, _ALL),
)

# Sums over so many rows that an order of additions shows.
LONG_CASES = (Case("long_rows", block(40_000, 8, inner=16), _ALL),)
