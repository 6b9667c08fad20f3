"""The SwiGLU block as one op against eager and `torch.compile` of its definition.

Bytes: forward reads x and writes y, and gate and up for the backward; backward reads the gradient, x, gate and up and
writes x's gradient; the weights stay in the cache. Operations: 6 rows · hidden · inner, and twice that.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.swiglu_mlp import samples
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes


def plain(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor
) -> torch.Tensor:
    """Three of PyTorch's linear layers and its silu."""
    linear = torch.nn.functional.linear
    return linear(torch.nn.functional.silu(linear(x, gate_weight)) * linear(x, up_weight), down_weight)


@pytest.mark.parametrize("size", samples.BENCHMARK_SIZES, ids=lambda s: f"{s.rows}x{s.hidden}x{s.inner}")
def test_swiglu_mlp(bench: Bench, make, device: torch.device, size: samples.Size) -> None:
    if device.type != "cpu":
        pytest.skip("the kernel is one for CPUs; a GPU runs three products and `swiglu`")
    maker: TensorMaker = make(torch.float32)
    flops = 6.0 * size.rows * size.hidden * size.inner
    outer, gates = 4 * size.rows * size.hidden, 8 * size.rows * size.inner
    rows = bench(
        op="swiglu_mlp",
        size=f"{size.rows}x{size.hidden}x{size.inner}",
        dtype=torch.float32,
        arguments=samples.block(size.rows, size.hidden, inner=size.inner)(maker),
        differentiable=("x", "gate_weight", "up_weight", "down_weight"),
        ours=ops.swiglu_mlp,
        reference=plain,
        work=Work(2 * outer + gates, 3 * outer + gates, flops, 2 * flops),
        peers=[],
    )
    assert verified_modes(rows) == {"forward", "backward"}
