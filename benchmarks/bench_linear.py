"""Narrow linear layers against PyTorch's (MKL or oneDNN) and `torch.compile` of it; the backward takes both gradients.

Bytes: forward reads x and writes y; backward reads x and the gradient and writes x's; the weight stays in the cache.
Operations: 2 rows · inputs · outputs, and twice that.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.linear import reference, samples
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes


@pytest.mark.parametrize("size", samples.BENCHMARK_SIZES, ids=lambda s: f"{s.rows}x{s.inputs}to{s.outputs}")
def test_linear(bench: Bench, make, device: torch.device, size: samples.Size) -> None:
    if device.type != "cpu":
        pytest.skip("the kernel is one for CPUs; a GPU runs PyTorch's own")
    maker: TensorMaker = make(torch.float32)
    flops = 2.0 * size.rows * size.inputs * size.outputs
    read, written = (4 * size.rows * width for width in (size.inputs, size.outputs))
    rows = bench(
        op="linear",
        size=f"{size.rows}x{size.inputs}to{size.outputs}",
        dtype=torch.float32,
        arguments={
            "x": maker.randn(size.rows, size.inputs),
            "weight": maker.randn(size.outputs, size.inputs),
            "bias": None,
        },
        differentiable=("x", "weight"),
        ours=ops.linear,
        reference=reference.linear,
        work=Work(read + written, 2 * read + written, flops, 2 * flops),
        peers=[],
    )
    assert verified_modes(rows) == {"forward", "backward"}
