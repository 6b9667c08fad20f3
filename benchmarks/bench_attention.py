"""RoPE + causal grouped-query attention against `F.scaled_dot_product_attention` (every backend) and FlexAttention.

All candidates rotate q and k; "eager" is the plain rotation followed by SDPA's own choice of backend, "compile" the
same under
`torch.compile`. Bytes: forward reads q, k, v and writes out; backward reads q, k, v, out and its gradient and writes
three gradients.
Flops: a causal forward is two products over half of the Sq x Sk pairs, 4 Sq Sk D Hq / 2; the backward five products,
2.5 times that. Work that a
kernel adds for a padded head dimension is not counted.
"""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from astrobiogen import ops
from astrobiogen.kernels.attention import reference, samples
from astrobiogen.kernels.cases import TensorMaker
from benchmarks import peers
from benchmarks.harness import Candidate, Mode, Work
from benchmarks.runner import Bench, verified_modes

Tensor = torch.Tensor
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES = samples.BENCHMARK_SIZES + (samples.GPU_BENCHMARK_SIZES if torch.cuda.is_available() else ())
# fp64 truth of 16,384 tokens would take minutes on a GPU with few fp64 units.
TRUTH_TOKENS = 4096
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.bfloat16)


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


def flex(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention compiled, with a causal block mask aligned at the end."""

    @functools.cache
    def mask_of(queries: int, keys: int) -> BlockMask:
        offset = keys - queries

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del batch, head
            return key <= query + offset

        return create_block_mask(visible, None, None, queries, keys, device=str(device))

    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, heads_first = mask_of(q.shape[1], k.shape[1]), (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)

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


def step(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward in one call, which returns the output and the gradients of q, k and v."""

    def call(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(True) for t in (q, k, v)]
        with torch.enable_grad():
            out = function(*leaves, cos, sin)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))

    return call


def ours(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.attention` with its arguments in order."""
    return ops.attention(q, k, v, cos=cos, sin=sin)


def name_of(size: samples.Size) -> str:
    """Queries x keys x query heads x key/value heads x head dimension."""
    return f"{size.queries or size.tokens}x{size.tokens}x{size.heads}x{size.kv_heads}x{size.dim}"


def problem(maker: TensorMaker, size: samples.Size, device: torch.device) -> tuple[dict[str, Tensor], Work]:
    """Arguments and the least work of a forward and of a backward."""
    queries, batch = size.queries or size.tokens, size.batch
    arguments = samples.tensors(maker, batch, queries, size.tokens, size.heads, size.kv_heads, size.dim)
    angle = torch.arange(size.tokens)[:, None] * 10_000.0 ** (-torch.arange(size.dim // 2) / (size.dim // 2))
    arguments |= {"cos": angle.cos().to(device), "sin": angle.sin().to(device)}
    row = batch * size.dim * maker.dtype.itemsize
    moved = 2 * row * (queries * size.heads + size.tokens * size.kv_heads)
    flops = 4.0 * batch * queries * (size.tokens - (queries - 1) / 2) * size.dim * size.heads
    return arguments, Work(moved, 2 * moved, flops, 2.5 * flops)


def shorter(maker: TensorMaker, size: samples.Size, device: torch.device) -> dict[str, Tensor] | None:
    """The problem at `TRUTH_TOKENS`, to verify on, if it is longer; else None."""
    if size.tokens <= TRUTH_TOKENS or size.queries is not None:
        return None
    return problem(maker, dataclasses.replace(size, tokens=TRUTH_TOKENS), device)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def test_attention(
    bench: Bench, quick: bool, make, device: torch.device, size: samples.Size, dtype: torch.dtype
) -> None:
    arguments, work = problem(make(dtype), size, device)
    queries = size.queries or size.tokens
    others = [] if queries == 1 else peers.attention(device)
    candidates = [Candidate(c.name, c.function and rotated(c.function), c.absent) for c in others]
    flexed = Candidate("flex", None, "left out by --quick") if quick else Candidate("flex", flex(device))
    modes: tuple[Mode, ...] = ("forward",) if queries == 1 else ("forward", "backward")
    rows = bench(
        op="attention",
        size=name_of(size),
        dtype=dtype,
        arguments=arguments,
        differentiable=("q", "k", "v"),
        ours=ours,
        reference=rotated(sdpa),
        work=work,
        peers=[*candidates, flexed],
        modes=modes,
        truth=truth,
        verified=shorter(make(dtype), size, device),
    )
    assert verified_modes(rows) == set(modes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size.queries is None], ids=name_of)
def test_attention_step(bench: Bench, make, device: torch.device, size: samples.Size, dtype: torch.dtype) -> None:
    """Forward + backward, and the memory of both together; the column "added" includes the returned gradients."""
    maker: TensorMaker = make(dtype)
    arguments, work = problem(maker, size, device)
    verified = shorter(maker, size, device)
    if verified is not None:
        verified["upstream"] = maker.randn(*verified["q"].shape)
    rows = bench(
        op="attention_step",
        size=name_of(size),
        dtype=dtype,
        arguments=arguments | {"upstream": maker.randn(*arguments["q"].shape)},
        differentiable=(),
        ours=step(ours),
        reference=step(rotated(sdpa)),
        work=Work(work.forward_bytes + work.backward_bytes, 0.0, work.forward_flops + work.backward_flops),
        peers=[
            Candidate("compiled attention", step(torch.compile(rotated(sdpa), fullgraph=True))),
            *(Candidate(c.name, c.function and step(rotated(c.function)), c.absent) for c in peers.attention(device)),
        ],
        modes=("forward",),
        truth=step(truth),
        verified=verified,
    )
    assert verified_modes(rows) == {"forward"}
