"""Linear cross-entropy against eager, `torch.compile` and Liger-Kernel (GPU).

Flops of the mathematics, T tokens, H hidden, V classes: forward 2 T H V (the logits), backward 4 T H V (dx and
dweight). Where the backward recomputes the logits (GPU) it does 6 T H V, and its share of the `torch.mm` ceiling counts
the 4 only. On the CPU the gradients come with the loss, so there forward and backward are timed together only (the
step), and the forward alone without gradients. Bytes: x and weight read, and dx and dweight written, once.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.linear_cross_entropy import samples
from benchmarks import peers
from benchmarks.harness import Candidate, Mode, Work
from benchmarks.runner import Bench, verified_modes

SIZES = samples.GPU_BENCHMARK_SIZES if torch.cuda.is_available() else samples.BENCHMARK_SIZES[:1]
# On a CPU without bf16 units eager's bf16 GEMMs take minutes here.
BF16_CPU = (torch.bfloat16,) if torch.cpu._is_avx512_bf16_supported() else ()
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, *BF16_CPU)


def eager(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The plain composition with an fp32 loss, as ours returns."""
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), target)


def step(loss: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Forward and backward in one call, as a training step runs them: returns (loss, dx, dweight)."""

    def call(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_(True) for t in (x, weight)]
        with torch.enable_grad():
            value = loss(*leaves, target)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.tokens}x{size.hidden}x{size.vocabulary}")
def test_linear_cross_entropy(bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    operands = (size.tokens + size.vocabulary) * size.hidden * dtype.itemsize
    flops = 2.0 * size.tokens * size.hidden * size.vocabulary
    modes: tuple[Mode, ...] = ("forward", "backward") if device.type == "cuda" else ("forward",)
    rows = bench(
        op="linear_cross_entropy",
        size=f"{size.tokens}x{size.hidden}x{size.vocabulary}",
        dtype=dtype,
        arguments={
            "x": maker.randn(size.tokens, size.hidden),
            "weight": maker.randn(size.vocabulary, size.hidden) * size.hidden**-0.5,
            "target": maker.randint(0, size.vocabulary, size.tokens),
        },
        differentiable=("x", "weight"),
        ours=ops.linear_cross_entropy,
        reference=eager,
        work=Work(operands, 2 * operands, flops, 2 * flops),
        peers=peers.linear_cross_entropy(device),
        modes=modes,
    )
    assert verified_modes(rows) == set(modes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.tokens}x{size.hidden}x{size.vocabulary}")
def test_linear_cross_entropy_step(
    bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype
) -> None:
    """Forward + backward, and the memory of both together; the column "added" includes the returned gradients."""
    maker: TensorMaker = make(dtype)
    operands = (size.tokens + size.vocabulary) * size.hidden * dtype.itemsize
    rows = bench(
        op="linear_cross_entropy_step",
        size=f"{size.tokens}x{size.hidden}x{size.vocabulary}",
        dtype=dtype,
        arguments={
            "x": maker.randn(size.tokens, size.hidden),
            "weight": maker.randn(size.vocabulary, size.hidden) * size.hidden**-0.5,
            "target": maker.randint(0, size.vocabulary, size.tokens),
        },
        differentiable=(),
        ours=step(ops.linear_cross_entropy),
        reference=step(eager),
        work=Work(3 * operands, 0.0, 6.0 * size.tokens * size.hidden * size.vocabulary),
        peers=[
            Candidate(peer.name, step(peer.function) if peer.function else None, peer.absent)
            for peer in [
                Candidate("compiled loss", torch.compile(eager, fullgraph=True)),
                *peers.linear_cross_entropy(device),
            ]
        ],
        modes=("forward",),
    )
    assert verified_modes(rows) == {"forward"}
