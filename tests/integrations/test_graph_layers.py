"""Attention layers of PyTorch Geometric before and after the swap."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import astrobiogen

geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")

LAYERS: dict[str, Callable[[], Any]] = {
    "transformer": lambda: geometric.TransformerConv(6, 5, 3),
    "transformer/mean": lambda: geometric.TransformerConv(6, 5, 3, concat=False, beta=True),
    "transformer/no-root": lambda: geometric.TransformerConv(6, 5, 2, root_weight=False, bias=False),
    "gat": lambda: geometric.GATConv(6, 5, 3),
    "gat/no-loops": lambda: geometric.GATConv(6, 5, 3, add_self_loops=False, concat=False),
    "gat/edges": lambda: geometric.GATConv(6, 5, 2, edge_dim=4, fill_value="mean"),
    "gatv2": lambda: geometric.GATv2Conv(6, 5, 3),
    "gatv2/shared": lambda: geometric.GATv2Conv(6, 5, 2, share_weights=True, residual=True),
    "gatv2/edges": lambda: geometric.GATv2Conv(6, 5, 2, edge_dim=4, add_self_loops=False),
}
NODES, EDGES = 30, 90


class Net(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.layer(*inputs, **options)


def inputs_of(layer: Any) -> tuple[Any, ...]:
    x, edges = torch.randn(NODES, 6), torch.randint(NODES - 2, (2, EDGES))  # two nodes without an edge
    return (x, edges) if getattr(layer, "edge_dim", None) is None else (x, edges, torch.randn(EDGES, 4))


def step(model: Any, inputs: tuple[Any, ...], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = inputs[0].clone().requires_grad_()
    out = model(x, *inputs[1:])
    (out * weights).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_stay(name: str) -> None:
    model = Net(LAYERS[name]())
    inputs = inputs_of(model.layer)
    weights = torch.randn_like(model(*inputs))
    expected = step(model, inputs, weights)
    exact = step(copy.deepcopy(model).double(), tuple(i.double() if i.is_floating_point() else i for i in inputs),
                 weights.double())  # fmt: skip
    names, held = list(model.state_dict()), {id(p) for p in model.parameters()}
    (row, *rest) = [r for r in astrobiogen.swap_layers(model) if r.name == "layer"]
    assert (row.was, row.now, rest) == (type(model.layer).__name__, "ops.edge_attention", [])
    assert list(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == held
    got = step(model, inputs, weights)
    assert not model.layer._plain
    assert list(got) == list(expected)
    for key, value in exact.items():
        error = (got[key] - value).abs().max()
        limit = 3 * (expected[key] - value).abs().max() + 4e-6 * value.abs().max() + 1e-7
        assert error <= limit, key


def test_two_sets_of_nodes() -> None:
    for layer in (geometric.TransformerConv((6, 4), 5, 2), geometric.GATConv((6, 4), 5, 2, add_self_loops=False),
                  geometric.GATv2Conv((6, 4), 5, 2, add_self_loops=False)):  # fmt: skip
        model = Net(layer)
        x, edges = (
            (torch.randn(20, 6), torch.randn(8, 4)),
            torch.stack([torch.randint(20, (50,)), torch.randint(8, (50,))]),
        )
        expected = model(x, edges)
        assert len(astrobiogen.swap_layers(model, only=("graph",)).swapped) == 1
        torch.testing.assert_close(model(x, edges), expected, rtol=1e-5, atol=1e-5)
        assert not layer._plain


@pytest.mark.parametrize("name", ["transformer", "gat", "gatv2"])
def test_what_the_operator_does_not_serve_goes_on_as_before(name: str) -> None:
    layer = LAYERS[name]()
    model = Net(layer).eval()
    x, edges = inputs_of(layer)
    expected, weights = model(x, edges, return_attention_weights=True), []
    astrobiogen.swap_layers(model)
    out, (index, alpha) = model(x, edges, return_attention_weights=True)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close((index, alpha), expected[1])
    layer.register_message_forward_hook(lambda *_: weights.append(1))
    torch.testing.assert_close(model(x, edges), expected[0])
    assert weights == [1]
    layer._message_forward_hooks.clear()
    layer.dropout = 0.5
    torch.testing.assert_close(model(x, edges), expected[0], rtol=1e-5, atol=1e-5)  # none while evaluating
    model.train()
    assert not torch.allclose(model(x, edges), model(x, edges))


def test_copies_files_restore_and_changed_graphs() -> None:
    model = Net(LAYERS["transformer"]())
    x, edges = inputs_of(model.layer)
    expected = model(x, edges)
    table = astrobiogen.swap_layers(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x, edges), expected, rtol=1e-5, atol=1e-5)
        assert isinstance(other.layer, geometric.TransformerConv)
        assert not other.layer._plain
    edges[:, :40] = edges[:, 40:80]  # in place: the sorted edges must follow
    changed = model(x, edges)
    table.restore()
    assert type(model.layer) is geometric.TransformerConv
    torch.testing.assert_close(changed, model(x, edges), rtol=1e-5, atol=1e-5)
    assert not [key for key in vars(model.layer) if key in ("_plain", "_edge_cache")]


def test_layers_that_do_more_are_left() -> None:
    hooked, summed = LAYERS["gat"](), geometric.GATConv(6, 5, 2, aggr="max")
    hooked.register_forward_hook(lambda *_: None)
    told = {row.was: row.reason for layer in (hooked, summed) for row in astrobiogen.swap_layers(Net(layer))
            if row.name == "layer"}  # fmt: skip
    assert told == {"GATConv": "its messages are put together by max"}
    (row,) = [row for row in astrobiogen.swap_layers(Net(hooked)) if row.name == "layer"]
    assert row.reason == "it has hooks"
