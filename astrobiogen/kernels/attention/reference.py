"""Attention in plain PyTorch: the definition that the kernels are tested against. Materialises all scores; correct,
not fast.
"""

from typing import Any, NamedTuple

import torch

from astrobiogen.kernels.attention.reference_masked import pairs, product
from astrobiogen.kernels.rope.reference import rope
from astrobiogen.kernels.values import is_batched

Forward = tuple[torch.Tensor, torch.Tensor]
OpForward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Options(NamedTuple):
    """What the ops take besides their tensors, in the order of their schema; see `op.attention`."""

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    sinks: torch.Tensor | None
    causal: bool
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none
    interleaved: bool


def rotate(x: torch.Tensor, o: Options, *, inverse: bool = False) -> torch.Tensor:
    """Rotate x [B, S, heads, D] by the last S rows of the angles, if there are any; `inverse` is its gradient."""
    if o.cos is None or o.sin is None:
        return x
    first = o.cos.shape[-2] - x.shape[1]
    return rope(x, o.cos[..., first:, :].detach(), o.sin[..., first:, :].detach(), o.interleaved, inverse)


def segment_bounds(cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last token of every token's own sequence, int32 [tokens]; an empty range behind
    cu_seqlens[-1].
    """
    position = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    last = cu_seqlens.numel() - 1
    # Sequences that begin at or before each token, less one; counted, since a search has no rule inside a vmap.
    begins = cu_seqlens.clamp(0, tokens).long()
    segment = begins.new_zeros(tokens + 1).scatter_add(0, begins, torch.ones_like(begins)).cumsum(0)[:tokens] - 1
    inside = segment < last
    segment = segment.clamp(0, max(last - 1, 0))
    start = torch.where(inside, cu_seqlens[segment], position).clamp(0, tokens)
    end = torch.where(inside, cu_seqlens[(segment + 1).clamp(max=last)], position).clamp(0, tokens)
    return start.to(torch.int32), end.to(torch.int32)


def _check_bounds(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """RuntimeError on the CPU unless 0 = c_0 <= c_1 <= ... <= c_n <= tokens."""
    if cu_seqlens.device.type == "cpu" and not is_batched(cu_seqlens):  # an assertion has no rule inside a vmap
        valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        torch._assert_async(valid, f"cu_seqlens must start at 0, not decrease and end at most at S = {tokens}")


def visible(queries: int, keys: int, o: Options, device: torch.device) -> torch.Tensor:
    """Boolean [queries, keys]: which keys each query sees. Query i stands at key position i + keys - queries."""
    position = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries)
    key = torch.arange(keys, device=device).unsqueeze(0)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if o.causal:
        mask = mask & (key <= position)
    if o.window > 0:
        reach = min(o.window, queries + keys)  # farther than any key, and no sum overflows
        mask = mask & (key > position - reach) & (key < position + reach)
    if o.cu_seqlens is not None:
        _check_bounds(o.cu_seqlens, queries)
        start, end = segment_bounds(o.cu_seqlens, queries)
        mask = mask & (key >= start.unsqueeze(1)) & (key < end.unsqueeze(1))
    return mask


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated q as [B, Hkv, G, Sq, D], rotated k and v as [B, Hkv, G, Sk, D], all in fp32 or wider."""
    q, k = rotate(q, o), rotate(k, o)
    compute = torch.promote_types(q.dtype, torch.float32)
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.to(compute).reshape(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    k, v = (x.to(compute).permute(0, 2, 1, 3).unsqueeze(2).expand(-1, -1, group, -1, -1) for x in (k, v))
    return q, k, v


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, o: Options) -> torch.Tensor:
    scores = pairs(q, k, mask) * o.scale
    return o.softcap * torch.tanh(scores / o.softcap) if o.softcap > 0 else scores


def is_half(dtype: torch.dtype) -> bool:
    """True for float16 and bfloat16."""
    return dtype in (torch.float16, torch.bfloat16)


def remainder(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """What rounding to half precision took away from fp32 numbers: the difference of the bits of `exact` and `rounded`
    as fp32, int16. Exact for bf16 and normal fp16 numbers; fp16 subnormals and what overflowed stay as rounded.
    """
    bits, base = exact.contiguous().view(torch.int32), rounded.float().contiguous().view(torch.int32)
    rest = (bits - base).clamp(-32768, 32767).to(torch.int16)
    return rest.masked_fill(~torch.isfinite(rounded), 0)


def unrounded(rounded: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers that `remainder` was taken from; `rounded` itself if it is not half precision."""
    if not is_half(rounded.dtype):
        return rounded
    return (rounded.float().contiguous().view(torch.int32) + rest).view(torch.float32)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Forward:
    """(out [B, Sq, Hq, D], lse [B, Hq, Sq]): see `op.attention`. Differentiable twice under plain autograd."""
    out, lse, _ = _attend(q, k, v, Options(*options))
    return out.to(q.dtype), lse


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options) -> OpForward:
    """(`out` as it is before rounding, lse, the scores [B, Hkv, G, Sq, columns] that went into lse)."""
    grouped_q, grouped_k, grouped_v = _grouped(q, k, v, o)
    mask = visible(q.shape[1], k.shape[1], o, q.device)
    scores = _scores(grouped_q, grouped_k, mask, o).masked_fill(~mask, -torch.inf)
    batch, kv_heads, group, queries, dim = grouped_q.shape
    if o.sinks is not None:
        sink = o.sinks.to(scores.dtype).reshape(kv_heads, group, 1, 1).expand(batch, -1, -1, queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    elif scores.shape[-1] == 0:  # no key at all: one column that nobody sees gives the zeros of an empty sum
        scores = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    # A row that sees nothing would be 0 / 0; its scores are set to 0, which also keeps its gradient finite, and its
    # output to 0.
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    probability = torch.softmax(scores, dim=-1)[..., : k.shape[1]].masked_fill(blind | ~mask, 0.0)
    out = product(probability, grouped_v, mask).permute(0, 3, 1, 2, 4).reshape(batch, queries, kv_heads * group, dim)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind.squeeze(-1), -torch.inf)
    return out, lse.reshape(batch, kv_heads * group, queries), scores


def correction(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """1 / sum_j exp(s_ij - lse_i), [B, Hq, Sq]: by this the probabilities that are recomputed from the rounded lse must
    be multiplied to sum up to 1. 1 for a row that sees nothing or is not finite.
    """
    total = torch.exp(scores - lse.reshape(scores.shape[:-1]).unsqueeze(-1)).sum(dim=-1)
    return torch.where(torch.isfinite(total), 1.0 / total, 1.0).reshape(lse.shape)


def empty_rest(q: torch.Tensor, lse: torch.Tensor, keep: bool) -> torch.Tensor:
    """Memory for what `attention_forward` returns as its third tensor."""
    like, dtype = (q, torch.int16) if is_half(q.dtype) else (lse, lse.dtype)
    return like.new_empty(like.shape if keep else (0,), dtype=dtype)


def attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options_and_keep: Any) -> OpForward:
    """The op's default kernel: `attention` with outputs in contiguous memory of their own, as an op promises, and with
    `keep` what the backward pass needs against rounding: the `remainder` of `out` in half precision, else the
    `correction`.
    """
    *options, keep = options_and_keep
    exact, lse, scores = _attend(q, k, v, Options(*options))
    out = exact.to(q.dtype)
    if not keep:
        return out.contiguous(), lse.contiguous(), empty_rest(q, lse, keep)
    rest = remainder(exact, out) if is_half(q.dtype) else correction(scores, lse)
    return out.contiguous(), lse.contiguous(), rest


def attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor,
    *options: Any,
) -> Backward:
    """(grad_q, grad_k, grad_v, grad_sinks); grad_sinks has no element without sinks. `rest`: as
    `attention_forward` gives it. Formulas: README.md.
    """
    o = Options(*options)
    grouped_q, grouped_k, grouped_v = _grouped(q, k, v, o)
    batch, kv_heads, group, queries, dim = grouped_q.shape
    shape = (batch, kv_heads, group, queries, 1)
    mask = visible(queries, k.shape[1], o, q.device)
    scores = _scores(grouped_q, grouped_k, mask, o)
    lse = lse.to(scores.dtype).reshape(shape)
    weight = 1.0 if is_half(q.dtype) else rest.reshape(shape)
    probability = weight * torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)).masked_fill(~mask, 0.0)
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    grad = grad.to(scores.dtype).reshape(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    saved = unrounded(out, rest).reshape(batch, queries, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    delta = (grad * saved).sum(dim=-1, keepdim=True).masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    if grad_lse is not None:
        delta = delta - grad_lse.to(scores.dtype).reshape(shape)
    grad_scores = probability * (pairs(grad, grouped_v, mask) - delta)
    if o.softcap > 0:
        grad_scores = grad_scores * (1.0 - (scores / o.softcap).square())
    grad_scores = grad_scores.masked_fill(~mask, 0.0)
    seen_by = mask.transpose(-1, -2)
    grad_q = (product(grad_scores, grouped_k, mask) * o.scale).permute(0, 3, 1, 2, 4).reshape(q.shape)
    grad_k = (product(grad_scores.transpose(-1, -2), grouped_q, seen_by) * o.scale).sum(dim=2).permute(0, 2, 1, 3)
    grad_v = product(probability.transpose(-1, -2), grad, seen_by).sum(dim=2).permute(0, 2, 1, 3)
    grad_q, grad_k = rotate(grad_q, o, inverse=True), rotate(grad_k, o, inverse=True)
    if o.sinks is None:
        grad_sinks = q.new_empty(0, dtype=torch.float32)
    else:
        sink = o.sinks.to(scores.dtype).reshape(kv_heads, group, 1, 1)
        share = (weight * torch.exp(sink - lse)).masked_fill(lse == -torch.inf, 0.0)
        grad_sinks = (-share * delta).sum(dim=(0, 3, 4)).reshape(-1).to(o.sinks.dtype)
    return grad_q.to(q.dtype).contiguous(), grad_k.to(k.dtype).contiguous(), grad_v.to(v.dtype).contiguous(), grad_sinks
