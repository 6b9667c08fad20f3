"""Inputs that edge attention must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.edge_attention import op, reference


@dataclasses.dataclass(frozen=True)
class Size:
    """A graph worth timing: `edges` random edges between `nodes`, heads of `width` columns."""

    nodes: int
    edges: int
    heads: int
    width: int


# A batch of metabolic networks has 4.5 edge ends per node: the presets "tiny", "small" and "original".
BENCHMARK_SIZES = (Size(8256, 36800, 4, 8), Size(8256, 36800, 8, 16), Size(8256, 36800, 16, 32))


def edge_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    receiver: torch.Tensor,
    sender: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The public function on edges that are not sorted yet."""
    return op.edge_attention(q, k, v, bias, op.edge_lists(receiver, sender, q.shape[0], k.shape[0]), scale)


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    receiver: torch.Tensor,
    sender: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition with the same arguments."""
    factor = float(q.shape[2]) ** -0.5 if scale is None else scale
    bias = q.new_zeros(()).expand(receiver.shape[0], q.shape[1]) if bias is None else bias
    return reference.edge_attention(q, k, v, bias, receiver, sender, factor)[0]


def graph(
    nodes: int, edges: int, heads: int, width: int, senders: int | None = None, **options: Any
) -> Callable[[TensorMaker], dict[str, Any]]:
    """Arguments of a random graph; node 0 receives nothing if there is another."""

    def build(make: TensorMaker) -> dict[str, Any]:
        others = nodes if senders is None else senders
        return {
            "q": make.randn(nodes, heads, width),
            "k": make.randn(others, heads, width),
            "v": make.randn(others, heads, width),
            "bias": make.randn(edges, heads),
            "receiver": make.randint(min(1, nodes - 1), nodes, edges),
            "sender": make.randint(0, others, edges),
            **options,
        }

    return build


def _packed(make: TensorMaker) -> dict[str, Any]:
    """Keys and values as halves of one projection, the bias one column slice, queries transposed."""
    q, kv = make.randn(3, 6, 16).transpose(0, 1), make.randn(6, 2, 3, 16)
    index = {"receiver": make.randint(0, 6, 14), "sender": make.randint(0, 6, 28)[::2]}
    return {"q": q, "k": kv[:, 0], "v": kv[:, 1], "bias": make.randn(14, 9)[:, ::3], **index}


def _no_bias(make: TensorMaker) -> dict[str, Any]:
    return graph(5, 9, 2, 8)(make) | {"bias": None}


def _peaked(make: TensorMaker, nodes: int = 6, edges: int = 20) -> dict[str, Any]:
    """Scores of some hundreds that q and k make, so that most of a node's weight is on one edge: its slope is what is
    left of 1 minus the weight."""
    arguments = graph(nodes, edges, 2, 8)(make)
    return arguments | {"q": arguments["q"] * 50}


def _large_scores(make: TensorMaker) -> dict[str, Any]:
    """Scores of some hundreds: exp overflows without the maximum."""
    arguments = graph(6, 20, 2, 8)(make)
    return arguments | {"bias": arguments["bias"] * 200}


def _cut(nodes: int, heads: int, width: int):
    """A bias of -inf cuts edges: for all heads or one, and all edges into the last node but one. No node is left with
    one edge.
    """

    def build(make: TensorMaker) -> dict[str, Any]:
        arguments = graph(nodes, 6 * nodes, heads, width)(make)
        receiver = torch.arange(nodes - 1).repeat_interleave(6).to(make.device)
        arguments["bias"] = arguments["bias"][: 6 * (nodes - 1)].clone()
        arguments["bias"][::6] = -torch.inf
        arguments["bias"][1::6, 0] = -torch.inf
        arguments["bias"][-6:] = -torch.inf
        return arguments | {"receiver": receiver, "sender": arguments["sender"][: 6 * (nodes - 1)]}

    return build


_GRADS = ("q", "k", "v", "bias")

CASES = (
    Case("gradcheck", graph(4, 7, 2, 3), _GRADS, gradcheck=True),
    Case("one", graph(1, 1, 1, 1), _GRADS),
    Case("no_edges", graph(3, 0, 2, 8), _GRADS),
    Case("no_nodes", lambda make: graph(1, 0, 2, 8)(make) | {"q": make.randn(0, 2, 8)}, _GRADS),
    Case("odd", graph(7, 23, 3, 5), _GRADS),
    Case("two_sets", graph(4, 18, 2, 12, senders=9), _GRADS),
    Case("packed", _packed, _GRADS),
    Case("expanded", lambda make: graph(5, 9, 2, 8)(make) | {"v": make.randn(1, 1, 8).expand(5, 2, 8)}, _GRADS),
    Case("no_bias", _no_bias, ("q", "k", "v")),
    Case("scale", graph(5, 12, 2, 8, scale=2.5), _GRADS),
    Case("large_scores", _large_scores, _GRADS),
    Case("cut", _cut(4, 3, 5), _GRADS, masks=True),
    Case("cut_fours", _cut(5, 4, 8), _GRADS, interpret=False, masks=True),
    Case("peaked", _peaked, _GRADS),
    Case("star", lambda make: graph(4, 70, 1, 8)(make) | {"receiver": torch.full((70,), 2)}, _GRADS),
    Case("head_68", graph(5, 11, 2, 68), _GRADS),
    Case("tiny", graph(300, 1300, 4, 8), _GRADS, interpret=False),
    Case("original", graph(60, 270, 16, 32), _GRADS, interpret=False),
)


def _long_star(make: TensorMaker) -> dict[str, Any]:
    """All edges into one node."""
    return graph(50, 20_000, 4, 8)(make) | {"receiver": torch.full((20_000,), 2)}


# Sums so long, or of numbers so large, that an order of additions shows.
LONG_CASES = (
    Case("long_star", _long_star, _GRADS, interpret=False),
    Case("long_peaked", lambda make: _peaked(make, 50, 4000), _GRADS, interpret=False),
    Case(
        "long_common",
        lambda make: graph(50, 4000, 4, 8)(make) | {"k": make.randn(50, 4, 8) + 100},
        _GRADS,
        interpret=False,
    ),
)
