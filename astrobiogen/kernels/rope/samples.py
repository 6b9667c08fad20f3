"""Inputs that RoPE must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem worth timing: x [1, length, heads, width], of whose columns the first `rotary` turn."""

    length: int
    heads: int
    width: int
    rotary: int


# Flagship: 64 query heads (8 key heads) of 68 columns, odd half 34; then heads of 128 and a partial rotary one. The
# first is the `--quick` one.
BENCHMARK_SIZES = (
    Size(512, 64, 68, 68),
    Size(2048, 64, 68, 68),
    Size(2048, 8, 68, 68),
    Size(2048, 32, 128, 128),
    Size(2048, 32, 128, 64),
)

# What a CPU times: the rest tells nothing more there.
CPU_BENCHMARK_SIZES = (Size(512, 64, 68, 68), Size(2048, 64, 68, 68))


def _case(
    shape: tuple[int, int, int, int],
    half: int,
    *,
    interleaved: bool = False,
    batch: int | None = None,
    table_dtype: Any = None,
) -> Callable[[TensorMaker], dict[str, Any]]:
    """`batch`: leading axis of the tables, None for [S, r/2]."""

    def build(make: TensorMaker) -> dict[str, Any]:
        lead = () if batch is None else (batch,)
        angles = make.randn(*lead, shape[1], half, dtype=table_dtype)
        return {"x": make.randn(*shape), "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}

    return build


def _with_x(
    build_x: Callable[[TensorMaker], Any], half: int, interleaved: bool
) -> Callable[[TensorMaker], dict[str, Any]]:
    def build(make: TensorMaker) -> dict[str, Any]:
        x = build_x(make)
        angles = make.randn(x.shape[1], half)
        return {"x": x, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}

    return build


def _projection_slice(make: TensorMaker) -> Any:
    return make.randn(2, 3, 5 * 10).unflatten(-1, (5, 10))[:, :, 1:4]


def _head_first(make: TensorMaker) -> Any:
    return make.randn(2, 4, 3, 22).transpose(1, 2)


def _strided_columns(make: TensorMaker) -> Any:
    return make.randn(1, 3, 2, 24)[..., ::2]


def _expanded_heads(make: TensorMaker) -> Any:
    return make.randn(2, 3, 1, 12).expand(2, 3, 4, 12)


def _expanded_tables(make: TensorMaker) -> dict[str, Any]:
    angles = make.randn(1, 1, 6)
    tables = (angles.cos().expand(2, 3, 6), angles.sin().expand(2, 3, 6))
    return {"x": make.randn(2, 3, 2, 12), "cos": tables[0], "sin": tables[1]}


_GRADS = ("x",)

CASES = (
    Case("gradcheck", _case((2, 2, 2, 6), 3), _GRADS, gradcheck=True),
    Case("gradcheck_interleaved_partial", _case((1, 2, 2, 7), 2, interleaved=True, batch=1), _GRADS, gradcheck=True),
    Case("one_pair", _case((1, 1, 1, 2), 1), _GRADS),
    Case("one_column", _case((2, 1, 3, 1), 0), _GRADS),
    Case("no_tokens", _case((2, 0, 2, 8), 4), _GRADS),
    Case("no_batch", _case((0, 3, 2, 8), 4, batch=0), _GRADS),
    Case("nothing_rotary", _case((1, 2, 2, 5), 0), _GRADS),
    Case("half_34", _case((1, 3, 3, 68), 34), _GRADS),
    Case("half_34_interleaved", _case((1, 3, 3, 68), 34, interleaved=True), _GRADS),
    Case("half_35_batch", _case((2, 2, 3, 72), 35, batch=2), _GRADS),
    Case("partial", _case((2, 3, 2, 40), 8), _GRADS),
    Case("power_of_two", _case((1, 5, 2, 64), 32, interleaved=True), _GRADS),
    Case("many_tokens", _case((2, 37, 1, 8), 4), _GRADS),
    Case("many_heads", _case((1, 2, 67, 12), 6, interleaved=True), _GRADS),
    Case("projection_slice", _with_x(_projection_slice, 5, False), _GRADS),
    Case("head_first", _with_x(_head_first, 9, True), _GRADS),
    Case("strided_columns", _with_x(_strided_columns, 6, False), _GRADS),
    Case("expanded_heads", _with_x(_expanded_heads, 5, False), _GRADS),
    Case("expanded_tables", _expanded_tables, _GRADS),
    Case("flagship", _case((1, 16, 64, 68), 34), _GRADS, interpret=False),
)
