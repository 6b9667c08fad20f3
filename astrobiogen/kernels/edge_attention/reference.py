"""Attention along the edges of a graph in plain PyTorch: the definition that the kernels are held to.

score(e, h) = scale q[receiver(e), h] · k[sender(e), h] + bias(e, h)
p(e, h)     = exp(score(e, h)) / sum over edges e' into receiver(e) of exp(score(e', h))
out(i, h)   = sum over edges e into i of p(e, h) v[sender(e), h],   0 for a node without edges

An edge whose bias is -inf is none: what its ends hold, NaN included, reaches nothing.

Sums and the softmax are taken in fp32 (fp64 for fp64 input); the result is rounded once.
"""

from collections.abc import Sequence

import torch


def edge_order(index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions of `index` [E] in stable order, start of each of the values 0 … count among them [count + 1])."""
    counts = index.new_zeros(count + 1).scatter_add(0, index + 1, torch.ones_like(index))
    return torch.argsort(index, stable=True), counts.cumsum(0)


def edge_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    receiver: torch.Tensor,
    sender: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [N, heads, D], log of the softmax's denominator [N, heads], −inf for a node without edges)."""
    nodes, heads, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    cut = bias == float("-inf")
    wide_q = (q.to(exact) * scale).index_select(0, receiver).masked_fill(cut[..., None], 0.0)
    wide_k, wide_v = (t.to(exact).index_select(0, sender).masked_fill(cut[..., None], 0.0) for t in (k, v))
    scores = ((wide_q * wide_k).sum(-1) + bias.to(exact)).masked_fill(cut, float("-inf"))
    start = scores.new_full((nodes, heads), float("-inf"))
    highest = start.scatter_reduce(0, receiver[:, None].expand_as(scores), scores.detach(), "amax")
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (scores - highest.index_select(0, receiver)).exp()
    total = scores.new_zeros(nodes, heads).index_add(0, receiver, weights)
    lse = (total.log() + highest).masked_fill(total == 0, float("-inf"))
    total = total.clamp(min=torch.finfo(exact).tiny)
    sums = wide_v.new_zeros(q.shape).index_add(0, receiver, weights[..., None] * wide_v)
    return (sums / total[..., None]).to(q.dtype), lse


def edge_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    edges: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `edge_attention`; `edges` are the tensors of `EdgeLists`, in order."""
    return edge_attention(q, k, v, bias, edges[0], edges[1], scale)


def edge_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    lse: torch.Tensor,
    edges: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `edge_attention_backward`: gradients of q, k, v and bias. With g the gradient of out:
    dv(j) = Σ p g,  dbias(e) = ds = p (g·v − Σ p g·v),  dq(i) = scale Σ ds k,  dk(j) = scale Σ ds q; the inner sum over
    the receiver's edges. It equals g·out, but out was rounded."""
    receiver, sender = edges[:2]
    exact = torch.promote_types(q.dtype, torch.float32)
    cut = bias == float("-inf")
    ends = ((q, receiver), (grad, receiver), (k, sender), (v, sender))
    wide_q, wide_grad, wide_k, wide_v = (
        t.to(exact).index_select(0, index).masked_fill(cut[..., None], 0.0) for t, index in ends
    )
    scores = (wide_q * wide_k).sum(-1) * scale + bias.to(exact)
    weights = (scores - lse.index_select(0, receiver)).exp().masked_fill(cut, 0.0)
    along = (wide_grad * wide_v).sum(-1)
    own = lse.new_zeros(lse.shape).index_add(0, receiver, weights * along)
    slope = (weights * (along - own.index_select(0, receiver))).masked_fill(cut, 0.0)

    def gather(like: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(like.shape).index_add(0, index, values).to(like.dtype)

    return (
        gather(q, receiver, slope[..., None] * wide_k * scale),
        gather(k, sender, slope[..., None] * wide_q * scale),
        gather(v, sender, weights[..., None] * wide_grad),
        slope.to(bias.dtype),
    )
