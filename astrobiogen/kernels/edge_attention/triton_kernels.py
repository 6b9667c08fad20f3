"""Attention along edges on NVIDIA GPUs, forward and backward. Formulas: `reference.py`; bytes and floor: `README.md`.

One program owns one node and walks its sorted edges a few at a time; nobody else writes what it writes, so there are no
atomics and a repeated run gives the same bits. The backward is two kernels: by receivers (dq, dbias, and p and ds per
edge and head in fp32), then by senders (dk, dv from those).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.edge_attention.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.triton_launch import launch, wide

# Elements of one tile [edges, heads, columns]: 8 per thread of 4 warps; three such tiles of fp32 are 24 registers.
TILE_ELEMENTS = 1024
# A metabolic network has 4.5 edge ends per node: more than 8 edges at a time would mostly be masked.
MAX_EDGES = 8


@triton.jit
def _cells(HEADS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """(heads [H], offsets [H, D] in a node's dense row, which of them exist)."""
    heads = tl.arange(0, H)
    columns = tl.arange(0, D)
    live = (heads < HEADS)[:, None] & (columns < WIDTH)[None, :]
    return heads, heads[:, None] * WIDTH + columns[None, :], live


@triton.jit
def _tile(pointer, nodes, step, cells, mask):
    """Rows of `nodes` [edges] as [edges, H, D], widened; 0 where not `mask`."""
    return wide(tl.load(pointer + nodes[:, None, None] * step + cells[None, :, :], mask=mask, other=0.0))


@triton.jit
def _visible(bias_ptr, place, inside, heads, live, HEADS: tl.constexpr):
    """(bias [edges, H], which edges are there: a bias of -inf cuts one, which elements of their rows are read)."""
    bias = wide(tl.load(bias_ptr + place, mask=inside[:, None] & (heads < HEADS)[None, :], other=0.0))
    visible = inside[:, None] & (bias != float("-inf"))
    return bias, visible, visible[:, :, None] & live[None, :, :]


@triton.jit
def _edge_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, sender_ptr, order_ptr, start_ptr, out_ptr, lse_ptr, q_step, k_step, v_step, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, D: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program p: node p as receiver; softmax over its edges, EDGES at a time, with a running maximum."""
    node = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(start_ptr + node), tl.load(start_ptr + node + 1)
    heads, cells, live = _cells(HEADS, WIDTH, H, D)
    query = wide(tl.load(q_ptr + node * q_step + cells, mask=live, other=0.0)) * scale
    highest = tl.full([H], float("-inf"), query.dtype)
    total = tl.zeros([H], query.dtype)
    sums = tl.zeros([H, D], query.dtype)
    for first in range(begin, end, EDGES):
        slots = first + tl.arange(0, EDGES)
        inside = slots < end
        edges = tl.load(order_ptr + slots, mask=inside, other=0)
        others = tl.load(sender_ptr + edges, mask=inside, other=0)
        place = edges[:, None] * HEADS + heads[None, :]
        bias, visible, mask = _visible(bias_ptr, place, inside, heads, live, HEADS)
        scores = tl.sum(query[None, :, :] * _tile(k_ptr, others, k_step, cells, mask), 2) + bias
        scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 0))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        kept = tl.exp(highest - shift)
        weights = tl.exp(scores - shift[None, :])
        total = total * kept + tl.sum(weights, 0)
        values = _tile(v_ptr, others, v_step, cells, mask)
        sums = sums * kept[:, None] + tl.sum(weights[:, :, None] * values, 0)
        highest = raised
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    target = out_ptr + node * (HEADS * WIDTH) + cells
    tl.store(target, (sums / safe[:, None]).to(out_ptr.dtype.element_ty), mask=live)
    lse = tl.where(blind, float("-inf"), highest + tl.log(safe))
    tl.store(lse_ptr + node * HEADS + heads, lse, mask=heads < HEADS)


@triton.jit
def _edge_attention_bwd_receiver_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, sender_ptr, order_ptr, start_ptr, grad_q_ptr, grad_bias_ptr,
    weight_ptr, slope_ptr, grad_step, q_step, k_step, v_step, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, D: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program p: node p as receiver; dq, dbias, p and ds. The first walk over its edges takes g·out from its terms,
    because out was rounded; most nodes have one tile of edges, which the second walk finds in L1. Both walks count
    g·v from the first edge's on: where neighbours are alike, the rounding of g·v would pass the slopes, and it does
    not cancel over nodes."""
    node = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(start_ptr + node), tl.load(start_ptr + node + 1)
    heads, cells, live = _cells(HEADS, WIDTH, H, D)
    row = node * (HEADS * WIDTH) + cells
    query = wide(tl.load(q_ptr + node * q_step + cells, mask=live, other=0.0)) * scale
    grad = wide(tl.load(grad_ptr + node * grad_step + cells, mask=live, other=0.0))
    log_sum = tl.load(lse_ptr + node * HEADS + heads, mask=heads < HEADS, other=0.0)
    edge = tl.load(order_ptr + begin, mask=begin < end, other=0)
    here = (heads < HEADS) & (begin < end)
    seen = tl.load(bias_ptr + edge * HEADS + heads, mask=here, other=float("-inf")) > float("-inf")
    value = v_ptr + tl.load(sender_ptr + edge, mask=begin < end, other=0) * v_step + cells
    pivot = tl.sum(grad * wide(tl.load(value, mask=live & seen[:, None], other=0.0)), 1)
    own = tl.zeros([H], query.dtype)
    total = tl.zeros([H], query.dtype)
    rescale = tl.zeros([H], query.dtype)
    sums = tl.zeros([H, D], query.dtype)
    for walk in tl.static_range(2):
        for first in range(begin, end, EDGES):
            slots = first + tl.arange(0, EDGES)
            inside = slots < end
            edges = tl.load(order_ptr + slots, mask=inside, other=0)
            others = tl.load(sender_ptr + edges, mask=inside, other=0)
            place = edges[:, None] * HEADS + heads[None, :]
            place_mask = inside[:, None] & (heads < HEADS)[None, :]
            bias, visible, mask = _visible(bias_ptr, place, inside, heads, live, HEADS)
            keys = _tile(k_ptr, others, k_step, cells, mask)
            scores = tl.sum(query[None, :, :] * keys, 2) + bias
            weights = tl.where(visible, tl.exp(scores - log_sum[None, :]), 0.0)
            along = tl.sum(grad[None, :, :] * _tile(v_ptr, others, v_step, cells, mask), 2) - pivot[None, :]
            if walk == 0:
                own += tl.sum(weights * along, 0)
                total += tl.sum(weights, 0)
            else:
                weights = tl.where(visible, weights * rescale[None, :], 0.0)
                slopes = tl.where(visible, weights * (along - own[None, :]), 0.0)
                sums += tl.sum(slopes[:, :, None] * keys, 0)
                tl.store(weight_ptr + place, weights, mask=place_mask)
                tl.store(slope_ptr + place, slopes, mask=place_mask)
                tl.store(grad_bias_ptr + place, slopes.to(grad_bias_ptr.dtype.element_ty), mask=place_mask)
        if walk == 0:  # the weights sum up to 1 but for the rounding of lse, up to 3e-5 where scores pass 500
            rescale = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
            own *= rescale
    tl.store(grad_q_ptr + row, (sums * scale).to(grad_q_ptr.dtype.element_ty), mask=live)


@triton.jit
def _edge_attention_bwd_sender_kernel(
    grad_ptr, q_ptr, weight_ptr, slope_ptr, receiver_ptr, order_ptr, start_ptr, grad_k_ptr, grad_v_ptr, grad_step,
    q_step, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, D: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Program p: node p as sender; dk and dv."""
    node = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(start_ptr + node), tl.load(start_ptr + node + 1)
    heads, cells, live = _cells(HEADS, WIDTH, H, D)
    keys = tl.zeros([H, D], weight_ptr.dtype.element_ty)
    values = tl.zeros([H, D], weight_ptr.dtype.element_ty)
    for first in range(begin, end, EDGES):
        slots = first + tl.arange(0, EDGES)
        inside = slots < end
        edges = tl.load(order_ptr + slots, mask=inside, other=0)
        others = tl.load(receiver_ptr + edges, mask=inside, other=0)
        place = edges[:, None] * HEADS + heads[None, :]
        place_mask = inside[:, None] & (heads < HEADS)[None, :]
        slopes = tl.load(slope_ptr + place, mask=place_mask, other=0.0)
        weights = tl.load(weight_ptr + place, mask=place_mask, other=0.0)
        mask = (weights != 0.0)[:, :, None] & live[None, :, :]  # an edge cut by its bias has weight 0 exactly
        keys += tl.sum(slopes[:, :, None] * _tile(q_ptr, others, q_step, cells, mask), 0)
        values += tl.sum(weights[:, :, None] * _tile(grad_ptr, others, grad_step, cells, mask), 0)
    row = node * (HEADS * WIDTH) + cells
    tl.store(grad_k_ptr + row, (keys * scale).to(grad_k_ptr.dtype.element_ty), mask=live)
    tl.store(grad_v_ptr + row, values.to(grad_v_ptr.dtype.element_ty), mask=live)


def edge_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    edges: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `edge_attention` on CUDA."""
    _, sender, by_receiver, receiver_start, _, _ = edges
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    if out.numel() == 0:
        return out, lse
    q, k, v = map(_dense_rows, (q, k, v))
    lists = [index.contiguous() for index in (sender, by_receiver, receiver_start)]
    constants, warps = constants_of(q.shape[1], q.shape[2])
    launch(_edge_attention_fwd_kernel, (q.shape[0],))(
        q, k, v, bias.contiguous(), *lists, out, lse, q.stride(0), k.stride(0), v.stride(0), scale,
        num_warps=warps, **constants,
    )  # fmt: skip
    return out, lse


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
    """The op `edge_attention_backward` on CUDA."""
    receiver, sender, by_receiver, receiver_start, by_sender, sender_start = edges
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v, bias))
    weight = bias.new_empty(bias.shape, dtype=lse.dtype)
    slope = torch.empty_like(weight)
    grad, q, k, v = map(_dense_rows, (grad, q, k, v))
    constants, warps = constants_of(q.shape[1], q.shape[2])
    if q.numel():
        lists = [index.contiguous() for index in (sender, by_receiver, receiver_start)]
        launch(_edge_attention_bwd_receiver_kernel, (q.shape[0],))(
            grad, q, k, v, bias.contiguous(), lse.contiguous(), *lists, grads[0], grads[3],
            weight, slope, grad.stride(0), q.stride(0), k.stride(0), v.stride(0), scale, num_warps=warps,
            **constants,
        )  # fmt: skip
    if k.numel():
        lists = [index.contiguous() for index in (receiver, by_sender, sender_start)]
        launch(_edge_attention_bwd_sender_kernel, (k.shape[0],))(
            grad, q, weight, slope, *lists, grads[1], grads[2], grad.stride(0), q.stride(0), scale,
            num_warps=warps, **constants,
        )  # fmt: skip
    return grads


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` [nodes, heads, D] if a node's row is dense, however far apart nodes lie; else a copy."""
    dense = (t.shape[2] == 1 or t.stride(2) == 1) and (t.shape[1] == 1 or t.stride(1) == t.shape[2])
    return t if dense else t.contiguous()


def constants_of(heads: int, width: int) -> tuple[dict[str, int], int]:
    """Tile sizes of one program and its warps, for `heads` heads of `width` columns."""
    padded_heads, padded_width = (1 << max(0, size - 1).bit_length() for size in (heads, width))
    row = padded_heads * padded_width
    edges = max(1, min(MAX_EDGES, TILE_ELEMENTS // row))
    warps = max(1, min(8, row * edges // 256))
    return {"HEADS": heads, "WIDTH": width, "H": padded_heads, "D": padded_width, "EDGES": edges}, warps


def compile_cases() -> tuple[CompileCase, ...]:
    """The three kernels at every benchmark width, for the ahead-of-time gate; nodes and edges change no code."""
    return tuple(case for size in BENCHMARK_SIZES for dtype in ("fp16", "bf16") for case in _compile_cases(size, dtype))


def _compile_cases(size: Size, dtype: str) -> list[CompileCase]:
    constants, warps = constants_of(size.heads, size.width)
    exact = ("lse_ptr", "weight_ptr", "slope_ptr")
    index = ("sender_ptr", "receiver_ptr", "order_ptr", "start_ptr")
    cases = []
    for label, kernel in (
        ("forward", _edge_attention_fwd_kernel),
        ("backward_receiver", _edge_attention_bwd_receiver_kernel),
        ("backward_sender", _edge_attention_bwd_sender_kernel),
    ):
        names = [name for name in kernel.arg_names if name not in constants]
        kinds = {name: "*fp32" if name in exact else "*i64" if name in index else f"*{dtype}" for name in names}
        signature = {name: kinds[name] if name.endswith("_ptr") else "i32" for name in names} | {"scale": "fp32"}
        aligned = tuple(name for name in names if name != "scale")
        name = f"{label}/{size.heads}x{size.width}/{dtype}"
        cases.append(CompileCase(name, kernel, signature, constants, aligned, warps))
    return cases
