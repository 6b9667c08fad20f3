"""RoPE + causal grouped-query attention against `F.scaled_dot_product_attention` (every backend) and FlexAttention.

All candidates rotate q and k; "eager" is the plain rotation followed by SDPA's own choice of backend, "compile" the
same under
`torch.compile`. Bytes: forward reads q, k, v and writes out; backward reads q, k, v, out and its gradient and writes
three gradients.
Flops: a causal forward is two products over half of the Sq x Sk pairs, 4 Sq Sk D Hq / 2; the backward five products,
2.5 times that. Work that a
kernel adds for a padded head dimension is not counted.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from astrobiogen import ops
from astrobiogen.kernels._case import TensorMaker
from astrobiogen.kernels.attention import reference, samples
from benchmarks import peers
from benchmarks.harness import Candidate, Work
from benchmarks.runner import Bench

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES = samples.BENCHMARK_SIZES + (samples.GPU_BENCHMARK_SIZES if torch.cuda.is_available() else ())
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32,)


def rotated(attend: Attend) -> Callable[..., Tensor]:
    """Eager rotation of q and k, as Hugging Face's Llama does it, in front of `attend`. q stands at the last rows of
    cos and sin.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            c, s = (t[-x.shape[1] :, None].to(x.dtype) for t in (cos, sin))
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * c - b * s, a * s + b * c), dim=-1)

        return attend(turn(q), turn(k), v)

    return call


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with its own choice of backend; one query sees all keys, so decoding needs no mask."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, is_causal=q.shape[1] > 1, enable_gqa=True).transpose(1, 2)


def flex(device: torch.device, queries: int, keys: int) -> Callable[..., Tensor]:
    """FlexAttention compiled, with a causal block mask aligned at the end."""
    offset = keys - queries

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return key <= query + offset

    mask = create_block_mask(visible, None, None, queries, keys, device=str(device))
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)

    return rotated(attend)


def truth(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference, one query head at a time and recomputed in the backward: its scores would not fit otherwise."""
    group = q.shape[2] // k.shape[2]

    def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, cos, sin, None, None, True, q.shape[-1] ** -0.5, 0, 0.0, False)[0]

    parts = [
        checkpoint(
            head,
            q[:, :, h : h + 1],
            k[:, :, h // group : h // group + 1],
            v[:, :, h // group : h // group + 1],
            use_reentrant=False,
        )
        for h in range(q.shape[2])
    ]
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", SIZES, ids=lambda s: f"{s.queries or s.tokens}x{s.tokens}x{s.heads}x{s.kv_heads}x{s.dim}"
)
def test_attention(
    bench: Bench, quick: bool, make, device: torch.device, size: samples.Size, dtype: torch.dtype
) -> None:
    maker: TensorMaker = make(dtype)
    queries = size.queries or size.tokens
    arguments = samples.tensors(maker, size.batch, queries, size.tokens, size.heads, size.kv_heads, size.dim)
    angle = torch.arange(size.tokens)[:, None] * 10_000.0 ** (-torch.arange(size.dim // 2) / (size.dim // 2))
    arguments |= {"cos": angle.cos().to(device), "sin": angle.sin().to(device)}
    row = size.batch * size.dim * dtype.itemsize
    q_bytes, k_bytes = row * queries * size.heads, row * size.tokens * size.kv_heads
    flops = 4.0 * size.batch * queries * (size.tokens - (queries - 1) / 2) * size.dim * size.heads
    others = [] if queries == 1 else peers.attention(device)
    candidates = [Candidate(c.name, c.function and rotated(c.function), c.absent) for c in others]
    flexed = (
        Candidate("flex", None, "left out by --quick")
        if quick
        else Candidate("flex", flex(device, queries, size.tokens))
    )
    bench(
        op="attention",
        size=f"{queries}x{size.tokens}x{size.heads}x{size.kv_heads}x{size.dim}",
        dtype=dtype,
        arguments=arguments,
        differentiable=("q", "k", "v"),
        ours=ops.attention,
        reference=rotated(sdpa),
        work=Work(2 * q_bytes + 2 * k_bytes, 4 * q_bytes + 4 * k_bytes, flops, 2.5 * flops),
        peers=[*candidates, flexed],
        modes=("forward",) if queries == 1 else ("forward", "backward"),
        truth=truth,
    )
