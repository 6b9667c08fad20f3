"""Inputs that RMSNorm must handle, and the sizes worth timing."""

import dataclasses
from typing import Any

import torch

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem worth timing: `rows` tokens of `hidden` columns."""

    rows: int
    hidden: int


# 4352 is the flagship width; the others are those of widely used models. The first is the `--quick` one.
BENCHMARK_SIZES = (Size(512, 4352), Size(2048, 4352), Size(2048, 4096), Size(4096, 2048), Size(2048, 5120))
# What a CPU times: the rest tells nothing more there.
CPU_BENCHMARK_SIZES = (Size(512, 4352), Size(2048, 4352))
# 8192 and 16384 rows only where a GPU does them in well under a second.
GPU_BENCHMARK_SIZES = (Size(8192, 4352), Size(16384, 4352))


def _plain(*shape: int, weight_dtype: torch.dtype | None = None):
    def build(make: TensorMaker) -> dict[str, Any]:
        return {"x": make.randn(*shape), "weight": make.randn(shape[-1], dtype=weight_dtype)}

    return build


def _transposed(make: TensorMaker) -> dict[str, Any]:
    return {"x": make.randn(40, 3, 5).permute(1, 2, 0), "weight": make.randn(40)}


def _row_slice(make: TensorMaker) -> dict[str, Any]:
    return {"x": make.randn(6, 80)[::2, 5:72], "weight": make.randn(134)[::2]}


def _expanded(make: TensorMaker) -> dict[str, Any]:
    return {"x": make.randn(1, 64).expand(5, 64), "weight": make.randn(1).expand(64)}


def _large_values(make: TensorMaker) -> dict[str, Any]:
    # the squares pass the fp16 range (65504): the sum of squares must be taken in fp32
    return {"x": make.randn(3, 96) * 300, "weight": make.randn(96)}


def _small_eps(make: TensorMaker) -> dict[str, Any]:
    return {"x": make.randn(3, 33) * 1e-2, "weight": make.randn(33), "eps": 1e-12}


_GRADS = ("x", "weight")

CASES = (
    Case("gradcheck", _plain(3, 7), _GRADS, gradcheck=True),
    Case("one_element", _plain(1, 1), _GRADS, gradcheck=True),
    Case("no_rows", _plain(0, 24), _GRADS),
    Case("no_batch", _plain(2, 0, 24), _GRADS),
    Case("vector", _plain(50), _GRADS),
    Case("odd", _plain(2, 3, 67), _GRADS),
    Case("two_tiles", _plain(3, 272), _GRADS),
    Case("three_tiles", _plain(2, 433), _GRADS),
    Case("many_rows", _plain(67, 20), _GRADS),
    Case("fp32_weight", _plain(4, 72, weight_dtype=torch.float32), _GRADS),
    Case("transposed", _transposed, _GRADS),
    Case("row_slice", _row_slice, _GRADS),
    Case("expanded", _expanded, _GRADS),
    Case("large_values", _large_values, _GRADS),
    Case("small_eps", _small_eps, _GRADS),
    Case("flagship", _plain(2, 4352), _GRADS),
    Case("wide", _plain(3, 16640), _GRADS, interpret=False),
)

# Sums so long that an order of additions shows: of 60,000 rows in the weight's gradient, of 200,000 columns in a row.
LONG_CASES = (
    Case("long_rows", _plain(60_000, 8), _GRADS, interpret=False),
    Case("long_columns", _plain(2, 200_000), _GRADS, interpret=False),
)


def with_residual(case: Case) -> Case:
    """The same case for `add_rms_norm`: a residual of x's shape beside it."""

    def build(make: TensorMaker) -> dict[str, Any]:
        arguments = case.build(make)
        return {**arguments, "residual": make.randn(*arguments["x"].shape, dtype=arguments["x"].dtype)}

    return dataclasses.replace(case, build=build, differentiable=("x", "residual", "weight"))
