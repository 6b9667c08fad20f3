"""Kernels with one planted fault each, compiled by `tests/kernels/test_compile_gate.py` in a process without the
Triton interpreter.
"""

import dataclasses
import json
import sys

import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.testing.gate.worker import Known, compile_case


@triton.jit
def _copy(x_ptr, y_ptr, STRIDE: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y_ptr + index, tl.load(x_ptr + index * STRIDE))


@triton.jit
def _hoard(x_ptr, y_ptr, N: tl.constexpr):
    """Sixteen N-element rows are alive at once: with one warp far more than 255 registers per thread."""
    rows = tl.arange(0, 16)[:, None]
    tile = tl.load(x_ptr + rows * N + tl.arange(0, N)[None, :])
    total = tl.sum(tile, axis=1)[:, None]
    tl.store(y_ptr + rows * N + tl.arange(0, N)[None, :], tile * total)


@triton.jit
def _hoard_again(x_ptr, y_ptr, times, N: tl.constexpr):
    """The same in a loop that needs all rows in every pass."""
    places = tl.arange(0, 16)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x_ptr + places)
    for _ in range(times):
        tile = tile * tl.sum(tile, axis=1)[:, None]
    tl.store(y_ptr + places, tile)


@triton.jit
def _product(x_ptr, y_ptr, N: tl.constexpr):
    rows, cols = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows * N + cols)
    tl.store(y_ptr + rows * N + cols, tl.dot(x, x))


def main() -> None:
    """Print one JSON line per kernel."""
    copy = {"x_ptr": "*fp16", "y_ptr": "*fp16"}
    aligned = ("x_ptr", "y_ptr")
    single = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    product = {"x_ptr": "*fp16", "y_ptr": "*fp32"}
    cases = (
        CompileCase("good", _copy, copy, {"STRIDE": 1, "N": 1024}, aligned, num_warps=4),
        CompileCase("unaligned", _copy, copy, {"STRIDE": 1, "N": 1024}, (), num_warps=4),
        CompileCase("strided", _copy, copy, {"STRIDE": 3, "N": 1024}, aligned, num_warps=4),
        CompileCase("spilling", _hoard_again, single | {"times": "i32"}, {"N": 1024}, aligned, num_warps=1),
        CompileCase("spilling once", _hoard, single, {"N": 1024}, aligned, num_warps=1),
        CompileCase("dot", _product, product, {"N": 16}, aligned, num_warps=1, needs_mma=True),
        CompileCase("no dot", _copy, copy, {"STRIDE": 1, "N": 1024}, aligned, num_warps=4, needs_mma=True),
        CompileCase("misspelt", _copy, copy, {"STRID": 1, "N": 1024}, aligned, num_warps=4),
    )
    for case in cases:
        sys.stdout.write(json.dumps(dataclasses.asdict(compile_case(case, 86, Known()))) + "\n")


if __name__ == "__main__":
    main()
