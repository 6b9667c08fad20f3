"""RMSNorm and residual + RMSNorm against eager, `torch.compile`, `F.rms_norm` and Liger-Kernel.

Bytes: forward reads x and writes y (2 n); backward reads grad_y and x and writes grad_x (3 n). With the residual:
forward reads both addends and writes y and the sum (4 n); backward also reads the gradient of the sum (4 n).
n = rows x hidden x bytes per element.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.rms_norm import reference, samples
from benchmarks import peers
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes

SIZES = (
    samples.BENCHMARK_SIZES + samples.GPU_BENCHMARK_SIZES if torch.cuda.is_available() else samples.CPU_BENCHMARK_SIZES
)
# Half precision is what GPUs train in; the CPUs at hand have no fast fp16.
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows}x{size.hidden}")
def test_rms_norm(bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    moved = size.rows * size.hidden * dtype.itemsize
    rows = bench(
        op="rms_norm",
        size=f"{size.rows}x{size.hidden}",
        dtype=dtype,
        arguments={"x": maker.randn(size.rows, size.hidden), "weight": maker.randn(size.hidden)},
        differentiable=("x", "weight"),
        ours=ops.rms_norm,
        reference=reference.rms_norm,
        work=Work(2 * moved, 3 * moved),
        peers=peers.rms_norm(device),
    )
    assert verified_modes(rows) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows}x{size.hidden}")
def test_add_rms_norm(bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    moved = size.rows * size.hidden * dtype.itemsize
    rows = bench(
        op="add_rms_norm",
        size=f"{size.rows}x{size.hidden}",
        dtype=dtype,
        arguments={
            "x": maker.randn(size.rows, size.hidden),
            "residual": maker.randn(size.rows, size.hidden),
            "weight": maker.randn(size.hidden),
        },
        differentiable=("x", "residual", "weight"),
        ours=ops.add_rms_norm,
        reference=reference.add_rms_norm,
        work=Work(4 * moved, 4 * moved),
        peers=peers.add_rms_norm(device),
    )
    assert verified_modes(rows) == {"forward", "backward"}
