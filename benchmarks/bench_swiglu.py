"""SwiGLU, separate and packed, against eager, `torch.compile`, Liger-Kernel, fla and flash-attn.

Bytes: forward reads gate and up and writes the product (3 n); backward reads the gradient, gate and up and writes two
gradients (5 n). n = rows x columns x bytes per element. Packed moves the same bytes.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.swiglu import reference, samples
from benchmarks import peers
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes

SIZES = samples.BENCHMARK_SIZES if torch.cuda.is_available() else samples.CPU_BENCHMARK_SIZES
# Half precision is what GPUs train in; the CPUs at hand have no fast fp16.
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows}x{size.columns}")
def test_swiglu(bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    moved = size.rows * size.columns * dtype.itemsize
    rows = bench(
        op="swiglu",
        size=f"{size.rows}x{size.columns}",
        dtype=dtype,
        arguments={"gate": maker.randn(size.rows, size.columns), "up": maker.randn(size.rows, size.columns)},
        differentiable=("gate", "up"),
        ours=ops.swiglu,
        reference=reference.swiglu,
        work=Work(3 * moved, 5 * moved),
        peers=peers.swiglu(device),
    )
    assert verified_modes(rows) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.rows}x{size.columns}")
def test_swiglu_packed(bench: Bench, make, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    moved = size.rows * size.columns * dtype.itemsize
    rows = bench(
        op="swiglu_packed",
        size=f"{size.rows}x{size.columns}",
        dtype=dtype,
        arguments={"gate_up": maker.randn(size.rows, 2 * size.columns)},
        differentiable=("gate_up",),
        ours=ops.swiglu_packed,
        reference=reference.swiglu_packed,
        work=Work(3 * moved, 5 * moved),
        peers=[],
    )
    assert verified_modes(rows) == {"forward", "backward"}
