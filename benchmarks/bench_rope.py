"""RoPE against eager, `torch.compile`, Liger-Kernel, fla and flash-attn.

Bytes: forward and backward each read one tensor and write one (2 n), n = length x heads x width x bytes per element;
cos
and sin (length x rotary x 4 bytes together) are added.
"""

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.rope import reference, samples
from benchmarks import peers
from benchmarks.harness import Work
from benchmarks.runner import Bench, verified_modes

SIZES = samples.BENCHMARK_SIZES if torch.cuda.is_available() else samples.CPU_BENCHMARK_SIZES
# Half precision is what GPUs train in; the CPUs at hand have no fast fp16.
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.bfloat16)


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The definition, with the public function's arguments."""
    return reference.rope(x, cos, sin, interleaved, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s.length}x{s.heads}x{s.width}r{s.rotary}")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rope(
    bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype, interleaved: bool
) -> None:
    maker: TensorMaker = make(dtype)
    cos, sin = ops.rope_frequencies(size.length, size.rotary, device=device)
    moved = 2 * size.length * size.heads * size.width * dtype.itemsize + size.length * size.rotary * cos.itemsize
    name = f"{size.length}x{size.heads}x{size.width}r{size.rotary}"
    rows = bench(
        op="rope",
        size=f"{name}/pairs" if interleaved else name,
        dtype=dtype,
        arguments={
            "x": maker.randn(1, size.length, size.heads, size.width),
            "cos": cos,
            "sin": sin,
            "interleaved": interleaved,
        },
        differentiable=("x",),
        ours=ops.rope,
        reference=plain,
        work=Work(moved, moved),
        peers=peers.rope(device) if not interleaved else [],
    )
    assert verified_modes(rows) == {"forward", "backward"}
