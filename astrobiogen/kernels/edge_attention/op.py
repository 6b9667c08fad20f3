"""The op `edge_attention`: schema, shapes, argument checks, gradient formula and public functions."""

import math
from typing import Any, NamedTuple

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.checks import (
    INT32_SAFE,
    check_float,
    check_int,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from astrobiogen.kernels.edge_attention import reference
from astrobiogen.kernels.values import has_values, require_range

_TRITON = "astrobiogen.kernels.edge_attention.triton_kernels"


class EdgeLists(NamedTuple):
    """The edges of a graph, and their order by either end; built once by `edge_lists` and shared by all layers.

    Attributes:
        receiver: int64 [E], node that each edge brings a message to, in [0, receivers).
        sender: int64 [E], node that it comes from, in [0, senders).
        by_receiver: int64 [E], edges sorted by receiver, in their own order where it is the same.
        receiver_start: int64 [receivers + 1], where each receiver's edges start in `by_receiver`.
        by_sender: int64 [E], the same by sender.
        sender_start: int64 [senders + 1].
    """

    receiver: torch.Tensor
    sender: torch.Tensor
    by_receiver: torch.Tensor
    receiver_start: torch.Tensor
    by_sender: torch.Tensor
    sender_start: torch.Tensor


def edge_lists(receiver: torch.Tensor, sender: torch.Tensor, receivers: int, senders: int | None = None) -> EdgeLists:
    """Sort the edges of a graph by either end, for `edge_attention`.

    Args:
        receiver: int64 [E].
        sender: int64 [E].
        receivers: number of nodes that receive, in [0, 2^30].
        senders: number of nodes that send; default `receivers`, the same nodes.

    Returns:
        `EdgeLists` on the device of `receiver`.

    Raises:
        TypeError: an index tensor is not int64, or a number of nodes no integer.
        ValueError: the shapes do not fit, a number of nodes is out of its range, or an index is outside its nodes (not
            checked inside `torch.compile` and `vmap`; on a GPU the device stops, and is not waited for).
    """
    receivers = check_int("receivers", receivers, 0, INT32_SAFE)
    senders = receivers if senders is None else check_int("senders", senders, 0, INT32_SAFE)
    for name, index in (("receiver", receiver), ("sender", sender)):
        if check_tensor(name, index).dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {index.dtype}")
        check_shape(name, index, (receiver.numel(),), "[E], one entry per edge")
    check_same_device(receiver=receiver, sender=sender)
    if has_values(receiver) and has_values(sender):
        for name, index, count in (("receiver", receiver, receivers), ("sender", sender, senders)):
            require_range(index, count, lambda got, n=name, c=count: f"{n} must be in [0, {c}), got {got}; {n}s = {c}")
    return EdgeLists(receiver, sender, *_sorted(receiver, receivers), *_sorted(sender, senders))


def _sorted(index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in stable order of `index`, and where each of the values 0 … count starts."""
    if index.device.type != "cpu" or registry.reference_selected():
        return reference.edge_order(index, count)
    return torch.ops.astrobiogen.edge_order(index, count)


def _fake_order(index: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return index.new_empty(index.shape), index.new_empty(count + 1)


def edge_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    edges: EdgeLists,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-head attention along the edges of a graph (graph transformer, Dwivedi and Bresson 2020, arXiv:2012.09699).

    A node attends to the senders of its incoming edges: with score(e) = scale q[receiver]·k[sender] + bias(e) per head,
    out[i] = Σ softmax over the edges into i (score) v[sender]; 0 for a node without edges. Linear in nodes and edges;
    nothing of size [E, heads · D] is held, forward or backward. fp32 inside for half precision; sums run in the order
    of `edges`, so a repeated call gives the same bits.

    Args:
        q: [N, heads, D] of the receiving nodes; float32, bfloat16, float16 or float64.
        k: [M, heads, D] of the sending nodes.
        v: [M, heads, D].
        bias: [E, heads], added to the scores; None for none. -inf cuts the edge for that head: what its ends hold, NaN
            included, reaches nothing.
        edges: of `edge_lists(receiver, sender, N, M)`.
        scale: default D^(-1/2).

    Under autocast, as `F.scaled_dot_product_attention` with a mask: q, k, v and bias are cast to the autocast dtype
    (float64 stays).

    Returns:
        [N, heads, D], contiguous, with the dtype of `q`.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: a shape, a device or the scale does not fit; on the CPU also if `edges` hold an index outside its
            nodes or an order that is not the one of `edge_lists`. (On a GPU reading them would wait for the device:
            lists that `edge_lists` built are right, others are taken on trust.)
    """
    q, k, v, bias = autocast.lower_precision(q, k, v, bias)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape [nodes, heads, D], got {tuple(tensor.shape)}")
    heads, width = q.shape[1:]
    check_shape("k", k, (k.shape[0], heads, width), "[senders, heads, D], heads and D of q")
    check_shape("v", v, tuple(k.shape), "the shape of k")
    count = edges.receiver.shape[0]
    if bias is None:
        bias = q.new_zeros(()).expand(count, heads)
    check_float("bias", bias)
    check_shape("bias", bias, (count, heads), "[edges, heads]")
    check_shape("edges.receiver_start", edges.receiver_start, (q.shape[0] + 1,), "[nodes of q + 1]")
    check_shape("edges.sender_start", edges.sender_start, (k.shape[0] + 1,), "[nodes of k + 1]")
    check_same_dtype(q=q, k=k, v=v, bias=bias)
    check_same_device(q=q, k=k, v=v, bias=bias)
    a, b, c, d, e, f = edges
    if not q.device == a.device == b.device == c.device == d.device == e.device == f.device:
        check_same_device(q=q, **{f"edges.{name}": index for name, index in edges._asdict().items()})
    if q.device.type != "cpu":  # on the CPU the op checks them, and their values too
        _check_lists(edges)
    factor = float(max(width, 1)) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if registry.reference_selected():
        return autocast.reference(reference.edge_attention, q, k, v, bias, edges.receiver, edges.sender, factor)[0]
    return torch.ops.astrobiogen.edge_attention(q, k, v, bias, list(edges), factor)[0]


def _check_lists(edges: EdgeLists) -> None:
    """The lists' dtypes and lengths."""
    count = edges.receiver.numel()
    for name, index in edges._asdict().items():
        if check_tensor(f"edges.{name}", index).dtype != torch.int64:
            raise TypeError(f"edges.{name} must be int64, got {index.dtype}")
        if not name.endswith("_start"):
            check_shape(f"edges.{name}", index, (count,), "[E], one entry per edge")


def _fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    del rest
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad, rest
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bias, edges, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, output[1], *edges)


def _backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    del grad_lse
    q, k, v, bias, lse, *edges = ctx.saved_tensors
    nothing = None, None
    if grad is None:
        return None, None, None, None, *nothing
    return *torch.ops.astrobiogen.edge_attention_backward(grad, q, k, v, bias, lse, edges, ctx.scale), *nothing


def _check_raw_edges(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, *others: Any) -> None:
    """Of a launcher. The values are those of `edge_lists`: to look at them would wait for the GPU."""
    del v
    edges, _ = others
    count = (bias.shape[0],)
    expected = EdgeLists(count, count, count, (q.shape[0] + 1,), count, (k.shape[0] + 1,))  # type: ignore[arg-type]
    found = [tuple(index.shape) for index in edges]
    if found != list(expected) or any(index.dtype != torch.int64 or index.device != q.device for index in edges):
        raise ValueError(f"edges must be int64 of the shapes {tuple(expected)} on {q.device}, got {found}")


def _check_raw_edges_backward(_grad: torch.Tensor, *arguments: Any) -> None:
    q, k, v, bias, _, *others = arguments
    _check_raw_edges(q, k, v, bias, *others)


registry.define(
    "edge_order(Tensor index, SymInt count) -> (Tensor, Tensor)",
    operands="index: int64 E",
    reference=reference.edge_order,
    fake=_fake_order,
)
registry.define(
    "edge_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor[] edges, float scale) -> (Tensor, Tensor)",
    operands="q: float N heads D; k: q M heads D; v: q M heads D; bias: q E heads",
    also=_check_raw_edges,
    reference=reference.edge_attention_op,
    fake=_fake,
    triton=f"{_TRITON}:edge_attention",
)
registry.define(
    "edge_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor lse, "
    "Tensor[] edges, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    operands="q: float N heads D; k: q M heads D; v: q M heads D; "
    "bias: q E heads; grad: q N heads D; lse: exact N heads",
    also=_check_raw_edges_backward,
    reference=reference.edge_attention_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:edge_attention_backward",
)
registry.differentiable("edge_attention", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("edge_attention_backward")
