"""Inputs that SwiGLU must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem worth timing: `rows` tokens, `columns` gate (and as many up) columns."""

    rows: int
    columns: int


# 11605 = 8/3 x 4352 rounded down, odd; 11648 is the next multiple of 64; 17408 = 4 x 4352. The first is the `--quick`
# one.
BENCHMARK_SIZES = (Size(512, 11605), Size(512, 11648), Size(2048, 11605), Size(2048, 11648), Size(2048, 17408))
# What a CPU times: the rest tells nothing more there.
CPU_BENCHMARK_SIZES = (Size(512, 11605), Size(2048, 11605))


def _plain(*shape: int) -> Callable[[TensorMaker], dict[str, Any]]:
    def build(make: TensorMaker) -> dict[str, Any]:
        return {"gate": make.randn(*shape), "up": make.randn(*shape)}

    return build


def _packed_halves(make: TensorMaker) -> dict[str, Any]:
    gate, up = make.randn(3, 2, 2 * 37).chunk(2, dim=-1)
    return {"gate": gate, "up": up}


def _row_slice(make: TensorMaker) -> dict[str, Any]:
    return {"gate": make.randn(6, 80)[::2, 5:72], "up": make.randn(3, 70)[:, 3:]}


def _transposed(make: TensorMaker) -> dict[str, Any]:
    return {"gate": make.randn(40, 3, 5).permute(1, 2, 0), "up": make.randn(5, 3, 40).transpose(0, 1)}


def _strided_columns(make: TensorMaker) -> dict[str, Any]:
    return {"gate": make.randn(4, 66)[:, ::2], "up": make.randn(33, 4).T}


def _expanded(make: TensorMaker) -> dict[str, Any]:
    return {"gate": make.randn(1, 64).expand(5, 64), "up": make.randn(5, 1).expand(5, 64)}


def _three_axes(make: TensorMaker) -> dict[str, Any]:
    # no two of the leading axes merge
    return {"gate": make.randn(4, 3, 2, 17).permute(2, 1, 0, 3), "up": make.randn(2, 3, 4, 20)[..., :17]}


def _large_gates(make: TensorMaker) -> dict[str, Any]:
    # exp(-gate) passes the fp32 range from -89 down; sigmoid must come out as exp(gate), not as 0 or NaN
    return {"gate": make.randn(4, 50) * 40, "up": make.randn(4, 50)}


_GRADS = ("gate", "up")

CASES = (
    Case("gradcheck", _plain(4, 6), _GRADS, gradcheck=True),
    Case("one_element", _plain(1), _GRADS, gradcheck=True),
    Case("no_rows", _plain(0, 24), _GRADS),
    Case("no_columns", _plain(3, 0), _GRADS),
    Case("odd", _plain(2, 3, 67), _GRADS),
    Case("two_tiles", _plain(1, 1500), _GRADS),
    Case("packed_halves", _packed_halves, _GRADS),
    Case("row_slice", _row_slice, _GRADS),
    Case("transposed", _transposed, _GRADS),
    Case("strided_columns", _strided_columns, _GRADS),
    Case("expanded", _expanded, _GRADS),
    Case("three_axes", _three_axes, _GRADS),
    Case("large_gates", _large_gates, _GRADS),
    Case("flagship", _plain(3, 11605), _GRADS, interpret=False),
)


def _packed(*shape: int) -> Callable[[TensorMaker], dict[str, Any]]:
    def build(make: TensorMaker) -> dict[str, Any]:
        return {"gate_up": make.randn(*shape)}

    return build


def _packed_slice(make: TensorMaker) -> dict[str, Any]:
    return {"gate_up": make.randn(5, 2, 90).transpose(0, 1)[..., 4:]}


def _packed_expanded(make: TensorMaker) -> dict[str, Any]:
    return {"gate_up": make.randn(1, 48).expand(3, 48)}


PACKED_CASES = (
    Case("gradcheck", _packed(2, 3, 6), ("gate_up",), gradcheck=True),
    Case("one_pair", _packed(2), ("gate_up",)),
    Case("no_rows", _packed(0, 24), ("gate_up",)),
    Case("no_columns", _packed(2, 0), ("gate_up",)),
    Case("odd", _packed(2, 3, 134), ("gate_up",)),
    Case("slice", _packed_slice, ("gate_up",)),
    Case("expanded", _packed_expanded, ("gate_up",)),
    Case("two_tiles", _packed(1, 2100), ("gate_up",)),
    Case("flagship", _packed(2, 23210), ("gate_up",), interpret=False),
)
