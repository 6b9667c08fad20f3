"""Attention layers of PyTorch Geometric through `ops.edge_attention`, which holds nothing of size [E, heads · D].

A layer keeps its parameters, hooks and the name of its class: the class is replaced by a subclass whose message passing
is one operator. Calls that the operator does not serve (edge features in the messages, dropout of the
attention weights while training, attention weights as a result, sparse adjacency, an explanation) go to PyTorch
Geometric's own message passing.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from astrobiogen import ops
from astrobiogen.integrations.table import Swap, SwapTable

_CACHE = "_edge_cache"
_LIMIT = 1e-4  # of the largest value, in fp32
Wanted = Callable[[str, str], bool]


class EdgeCache:
    """The sorted edges of the graphs that are alive, for all layers of a model and for the steps that follow. Copies
    and saved models begin with an empty one.
    """

    def __init__(self) -> None:
        self._held = WeakTensorKeyDictionary()

    def edges(self, edge_index: torch.Tensor, senders: int, receivers: int) -> ops.EdgeLists:
        """The edges of `edge_index` [2, E], sender first."""
        if torch.compiler.is_compiling():
            return ops.edge_lists(edge_index[1], edge_index[0], receivers, senders)
        key = edge_index._version, senders, receivers
        held = self._held.get(edge_index)
        if held is None or held[0] != key:
            held = key, ops.edge_lists(edge_index[1], edge_index[0], receivers, senders)
            self._held[edge_index] = held
        return held[1]

    def __reduce__(self) -> Any:
        return EdgeCache, ()


def _served(layer: Any, edge_index: Any) -> bool:
    """Whether the message passing of this call is the operator's."""
    return (
        type(edge_index) is torch.Tensor
        and edge_index.dtype == torch.int64
        and edge_index.dim() == 2
        and layer.flow == "source_to_target"
        and not (layer.dropout and layer.training)
        and not layer.explain
        and not (layer._propagate_forward_pre_hooks or layer._propagate_forward_hooks)
        and not (layer._message_forward_pre_hooks or layer._message_forward_hooks)
        and not (layer._aggregate_forward_pre_hooks or layer._aggregate_forward_hooks)
        and not (layer._edge_update_forward_pre_hooks or layer._edge_update_forward_hooks)
    )


def _weighted(v: torch.Tensor, bias: torch.Tensor, edges: ops.EdgeLists, receivers: int) -> torch.Tensor:
    """Σ softmax over the edges into a node (bias) v[sender]."""
    heads, width = v.shape[1:]
    nothing = v.new_zeros(())
    q, k = nothing.expand(receivers, heads, width), nothing.expand(v.shape[0], heads, width)
    return ops.edge_attention(q, k, v, bias, edges)


class _Transformer:
    """Message passing of `TransformerConv` without edge features."""

    def forward(self: Any, x: Any, edge_index: Any, edge_attr: Any = None, return_attention_weights: Any = None) -> Any:
        self._plain = edge_attr is not None or return_attention_weights is not None or not _served(self, edge_index)
        return super().forward(x, edge_index, edge_attr, return_attention_weights)  # type: ignore[misc]

    def propagate(self: Any, edge_index: Any, size: Any = None, **inputs: Any) -> Any:
        if self._plain or size is not None:
            return super().propagate(edge_index, size=size, **inputs)  # type: ignore[misc]
        q, k, v = inputs["query"], inputs["key"], inputs["value"]
        return ops.edge_attention(q, k, v, None, self._edge_cache.edges(edge_index, k.shape[0], q.shape[0]))


class _Graph:
    """Message passing of `GATConv` and `GATv2Conv`: scores of the edges are a bias."""

    def forward(
        self: Any, x: Any, edge_index: Any, edge_attr: Any = None, *more: Any, return_attention_weights: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        size = options.get("size", more[0] if more and type(self).sized else None)
        self._plain = bool(more[1:] or return_attention_weights is not None) or size is not None
        self._plain = self._plain or bool(more and not type(self).sized) or not _served(self, edge_index)
        if return_attention_weights is not None:
            options["return_attention_weights"] = return_attention_weights
        return super().forward(x, edge_index, edge_attr, *more, **options)  # type: ignore[misc]

    def edge_updater(self: Any, edge_index: Any, size: Any = None, **inputs: Any) -> Any:
        if self._plain:
            return super().edge_updater(edge_index, size=size, **inputs)  # type: ignore[misc]
        return self._scores(edge_index[0], edge_index[1], **inputs)

    def propagate(self: Any, edge_index: Any, size: Any = None, **inputs: Any) -> Any:
        if self._plain:
            return super().propagate(edge_index, size=size, **inputs)  # type: ignore[misc]
        sent, received = inputs["x"]
        receivers = sent.shape[0] if received is None else received.shape[0]
        edges = self._edge_cache.edges(edge_index, sent.shape[0], receivers)
        return _weighted(sent, inputs["alpha"], edges, receivers)

    def _of_edges(self: Any, edge_attr: torch.Tensor) -> torch.Tensor:
        features = edge_attr if edge_attr.dim() > 1 else edge_attr[:, None]
        return self.lin_edge(features).view(-1, self.heads, self.out_channels)


class _GAT(_Graph):
    sized = True

    def _scores(
        self: Any, sender: torch.Tensor, receiver: torch.Tensor, alpha: Any, edge_attr: torch.Tensor | None
    ) -> torch.Tensor:
        score = alpha[0].index_select(0, sender)
        if alpha[1] is not None:
            score = score + alpha[1].index_select(0, receiver)
        if edge_attr is not None and self.lin_edge is not None:
            score = score + (self._of_edges(edge_attr) * self.att_edge).sum(-1)
        return F.leaky_relu(score, self.negative_slope)


class _GATv2(_Graph):
    sized = False

    def _scores(
        self: Any, sender: torch.Tensor, receiver: torch.Tensor, x: Any, edge_attr: torch.Tensor | None
    ) -> torch.Tensor:
        both = x[1].index_select(0, receiver) + x[0].index_select(0, sender)
        if edge_attr is not None:
            both = both + self._of_edges(edge_attr)
        return (F.leaky_relu(both, self.negative_slope) * self.att).sum(-1)


_KINDS: dict[str, type] = {"TransformerConv": _Transformer, "GATConv": _GAT, "GATv2Conv": _GATv2}


@functools.cache
def fused(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of one of PyTorch Geometric's layers, under the same name."""
    return type(kind.__name__, (_KINDS[kind.__name__], kind), {"__module__": __name__, "__reduce__": _reduced})


def _reduced(self: Any) -> Any:
    kind = type(self).__mro__[2]
    return _again, (kind,), self.__dict__


def _again(kind: type[nn.Module]) -> Any:
    made = fused(kind)
    return made.__new__(made)


def swap_graph_layers(model: nn.Module, table: SwapTable, wanted: Wanted, left_because: Callable[[Any], str]) -> None:
    """Replace the classes of PyTorch Geometric's attention layers in `model`, and write a row for each."""
    layers: Any = sys.modules.get("torch_geometric.nn")
    if layers is None:  # a model that has such layers has loaded it
        return
    kinds, cache = [getattr(layers, name) for name in _KINDS], EdgeCache()
    for name, module in model.named_modules():
        if type(module) not in kinds:
            continue
        reason = left_because(module) if wanted("graph", name) else "not chosen"
        if not reason and module.aggr not in ("add", "sum"):
            reason = f"its messages are put together by {module.aggr}"
        if not reason:
            reason = _changed(module, cache)
        if not reason:
            table.on_restore(functools.partial(_turn_back, module, type(module).__mro__[2]))
        was = type(module).__name__
        table.append(Swap(name, was, "" if reason else "ops.edge_attention", reason or "nothing is held per edge"))


def _turn_back(module: Any, kind: type[nn.Module]) -> None:
    if type(module) is fused(kind):
        module.__class__ = kind
        del module.__dict__[_CACHE]
        module.__dict__.pop("_plain", None)


def _changed(module: Any, cache: EdgeCache) -> str:
    """Replace the class of `module`; back again, with the reason, if a small graph gives other values."""
    kind = type(module)
    before = _trial(module)
    module.__class__, module.__dict__[_CACHE] = fused(kind), cache
    if before is None:
        return ""
    after = _trial(module)
    if after is not None and float((after - before).abs().max()) <= _LIMIT * float(before.abs().max() + 1e-30):
        return ""
    _turn_back(module, kind)
    return "a trial on a small graph gave other values"


@torch.no_grad()
def _trial(module: Any) -> torch.Tensor | None:
    """Result for five nodes; None where there is no storage, or where sizes come from the first call."""
    held = list(module.parameters())
    lazy = any(isinstance(one, nn.parameter.UninitializedParameter) for one in held)
    if lazy or not held or held[0].is_meta or not isinstance(module.in_channels, int) or module.edge_dim is not None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, module.in_channels, generator=generator).to(held[0])
    edges = torch.tensor([[0, 1, 2, 3, 0, 4, 2], [1, 1, 3, 0, 2, 3, 3]], device=x.device)
    training, module.training = module.training, False
    try:
        return module(x, edges)
    finally:
        module.training = training
