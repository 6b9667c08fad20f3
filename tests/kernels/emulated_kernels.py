"""Kernels of the usual kinds on the emulator, sound and with planted faults; run by `test_emulator.py`.

Triton compiles here, so TRITON_INTERPRET must be unset. Prints a JSON object: name -> what was seen.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from astrobiogen.testing import emulate
from astrobiogen.testing.ptx import Emulation, UnsupportedInstructionError


@triton.jit
def softmax_kernel(x, y, columns, COLUMNS: tl.constexpr):
    """One row per program."""
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    score = tl.load(x + row * columns + column, mask=column < columns, other=float("-inf"))
    weight = tl.exp(score - tl.max(score, 0))
    tl.store(y + row * columns + column, weight / tl.sum(weight, 0), mask=column < columns)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile of c = a b per program, K in a pipelined loop."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def layer_norm_kernel(x, weight, bias, y, columns, eps, BLOCK: tl.constexpr):
    """One row per program, in blocks of columns, three walks."""
    row = tl.program_id(0) * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(x + row + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / columns
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(column < columns, value - mean, 0.0)
        squares += value * value
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / columns + eps)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < columns
        value = (tl.load(x + row + column, mask=live, other=0.0).to(tl.float32) - mean) * scale
        value = value * tl.load(weight + column, mask=live, other=0.0) + tl.load(bias + column, mask=live, other=0.0)
        tl.store(y + row + column, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def shift_kernel(x, count, BLOCK: tl.constexpr):
    """x[i] = x[i + 1] in place: at the seam of two programs, who comes first decides."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at + 1, mask=at + 1 < count, other=0.0), mask=at < count)


@triton.jit
def count_kernel(x, total, count, BLOCK: tl.constexpr):
    """total[0] += sum of x, atomically."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + at, mask=at < count, other=0.0), 0))


def softmax(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    softmax_kernel[(x.shape[0],)](x, y, x.shape[1], COLUMNS=256)
    return y


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=a.dtype)

    def grid(constants: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(m, constants["BM"]), triton.cdiv(n, constants["BN"])

    matmul_kernel[grid](a, b, c, m, n, k, BM=64, BN=64, BK=32, num_stages=3, num_warps=4)
    return c


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    layer_norm_kernel[(x.shape[0],)](x, weight, bias, y, x.shape[1], 1e-5, BLOCK=128)
    return y


def shift(x: torch.Tensor) -> torch.Tensor:
    shift_kernel[(triton.cdiv(x.numel(), 64),)](x, x.numel(), BLOCK=64)
    return x


def count(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(1)
    count_kernel[(triton.cdiv(x.numel(), 128),)](x, total, x.numel(), BLOCK=128)
    return total


def without(pattern: str, which: int, replacement: str = "") -> Callable[[str], str]:
    """Replaces occurrence `which` of `pattern`, all of them for -1."""

    def edit(ptx: str) -> str:
        places = list(re.finditer(pattern, ptx))
        assert places, pattern
        for place in reversed(places if which < 0 else places[which : which + 1]):
            ptx = ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :]
        return ptx

    return edit


def loop_barrier(ptx: str) -> str:
    """Drops the barrier behind the wait inside the loop."""
    start = ptx.index("bar.sync", ptx.index("cp.async.wait_group"))
    return ptx[:start] + ptx[ptx.index("\n", start) :]


BARRIER = r"bar\.sync\s+0;"
FAULTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "no barrier in a reduction": ("softmax", without(BARRIER, 0)),
    "no second barrier in a reduction": ("softmax", without(BARRIER, 2)),
    "no barrier in a pipelined loop": ("matmul", loop_barrier),
    "no wait for copies": ("matmul", without(r"cp\.async\.wait_group\s+\S+;", -1, "cp.async.wait_group 99;")),
    "no mask at a store": ("softmax", without(r"@%p\d+ (st\.global)", -1, r"\1")),
    "barrier of half a block": ("softmax", without(BARRIER, 0, "setp.lt.u32 %p1, %tid.x, 64;\n\t@%p1 bar.sync 0;")),
    "an unknown instruction": ("softmax", without(BARRIER, 0, "nanosleep.u32 5;")),
}


def seen(run: Emulation, exact: torch.Tensor) -> dict[str, Any]:
    error = None if run.result is None else (run.result.double() - exact).abs().max().item()
    return {
        "error": error, "findings": [str(finding) for finding in run.findings], "kernels": len(run.kernels),
        "instructions": run.instructions,
    }  # fmt: skip


def main() -> None:
    """Everything, with the fp64 results beside."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(12, 200), torch.randn(300), torch.randn(300)
    rows = torch.randn(9, 300)
    norm = torch.nn.functional.layer_norm(rows.double(), (300,), weight.double(), bias.double())
    results: dict[str, Any] = {}
    for arch in (80, 86, 89):
        results[f"softmax sm_{arch}"] = seen(emulate(softmax, (x,), arch=arch), x.double().softmax(1))
    results["layer norm"] = seen(emulate(layer_norm, {"x": rows, "weight": weight, "bias": bias}), norm)
    inputs = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        inputs[dtype] = a, b = torch.randn(100, 208).to(dtype), torch.randn(208, 72).to(dtype)
        results[f"matmul {str(dtype)[6:]}"] = seen(emulate(matmul, (a, b)), a.double() @ b.double())
    half = inputs[torch.float16]
    known = {
        "softmax": (softmax, (x,), x.double().softmax(1)),
        "matmul": (matmul, half, half[0].double() @ half[1].double()),
    }
    for name, (kernel, edit) in FAULTS.items():
        function, arguments, exact = known[kernel]
        try:
            results[name] = seen(emulate(function, arguments, edit=edit), exact)
        except UnsupportedInstructionError as error:
            results[name] = {"unsupported": str(error)}
    ramp = torch.arange(128.0)
    results["blocks that overwrite each other's input"] = seen(emulate(shift, (ramp,)), ramp.double())
    results["atomic sum"] = seen(emulate(count, (x.reshape(-1),)), x.double().sum().reshape(1))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
