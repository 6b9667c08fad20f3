"""The graph autoencoder: any sizes, no mixing between graphs, directed decoder, deterministic evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from astrobiogen.models import GraphVAEConfig, RebuiltGraphVAE
from astrobiogen.models.common import trainable_parameters
from astrobiogen.models.graph.attention import node_structure
from astrobiogen.models.graph.inputs import graph_tensors
from astrobiogen.models.graph.vae import sample_negatives

CONFIG = GraphVAEConfig(
    hidden_dim=16, latent_dim=8, num_layers=2, heads=2, global_tokens=2, edge_dim=8, dropout=0.0, beta=0.1
)
MakeGraph = Callable[..., Data]


def graphs(make_graph: MakeGraph, *sizes: tuple[int, int]) -> list[Data]:
    generator = torch.Generator().manual_seed(1)
    return [make_graph(*size, generator) for size in sizes]


def test_unknown_names_raise() -> None:
    with pytest.raises(TypeError, match="max_edges"):
        RebuiltGraphVAE(max_edges=50)


@pytest.mark.parametrize("sizes", [[(1, 0)], [(0, 0), (4, 3)], [(2, 1), (1, 0), (5, 6)], [(1400, 1600)]])
def test_any_graph_sizes(make_graph: MakeGraph, sizes: list[tuple[int, int]]) -> None:
    model = RebuiltGraphVAE(CONFIG)
    outputs = model(Batch.from_data_list(graphs(make_graph, *sizes)))
    outputs["loss"].backward()
    assert outputs["features"].shape == (len(sizes), 16)
    assert outputs["z"].shape == (len(sizes), 8)
    assert torch.isfinite(outputs["loss_per_sample"]).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_reaches_every_parameter(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG)
    outputs = model(Batch.from_data_list(graphs(make_graph, (9, 7), (6, 5))))
    (outputs["loss"] + outputs["features"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_constraints_off_removes_exactly_the_flux_head(make_graph: MakeGraph) -> None:
    plain = RebuiltGraphVAE(CONFIG, use_biochemical_constraints=False)
    assert trainable_parameters(RebuiltGraphVAE(CONFIG)) - trainable_parameters(plain) == 16 + 1
    assert plain(Batch.from_data_list(graphs(make_graph, (4, 3))))["constraints"] == {}


def test_evaluation_is_deterministic_and_training_is_not(make_graph: MakeGraph) -> None:
    model, batch = RebuiltGraphVAE(CONFIG), Batch.from_data_list(graphs(make_graph, (9, 7), (6, 5)))
    assert not torch.equal(model(batch)["z"], model(batch)["z"])
    model.eval()
    first, second = model(batch), model(batch)
    assert torch.equal(first["loss_per_sample"], second["loss_per_sample"])
    assert torch.equal(first["negative_edge_index"], second["negative_edge_index"])
    assert torch.equal(first["z"], first["mu"])


def test_graphs_do_not_mix_and_their_order_does_not_matter(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG).eval()
    items = graphs(make_graph, (9, 7), (6, 5), (1, 1), (12, 3))
    together = model(Batch.from_data_list(items))
    order = [2, 0, 3, 1]
    permuted = model(Batch.from_data_list([items[index] for index in order]))
    for name in ("features", "mu", "loss_per_sample"):
        torch.testing.assert_close(together[name][order], permuted[name])
        alone = torch.cat([model(Batch.from_data_list([item]))[name] for item in items])
        torch.testing.assert_close(together[name], alone)


def test_relabelling_nodes_does_not_change_features(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG).eval()
    (item,) = graphs(make_graph, (9, 7))
    order = torch.randperm(16)
    place = torch.empty_like(order)
    place[order] = torch.arange(16)
    per_node = {key: value[order] for key, value in item.to_dict().items() if value.shape[0] == 16}
    other = Data(**{**item.to_dict(), **per_node, "edge_index": place[item.edge_index]})
    torch.testing.assert_close(
        model(Batch.from_data_list([item]))["features"], model(Batch.from_data_list([other]))["features"]
    )


def test_sign_of_an_eigenvector_does_not_matter(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG).eval()
    (item,) = graphs(make_graph, (9, 7))
    flipped = item.clone()
    flipped.laplacian_pe = item.laplacian_pe * torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0)
    for name in ("features", "loss_per_sample"):
        torch.testing.assert_close(model(item)[name], model(flipped)[name])


def test_the_decoder_tells_the_direction_of_an_edge(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG).eval()
    (item,) = graphs(make_graph, (9, 7))
    reverse = item.clone()
    reverse.edge_index = item.edge_index.flip(0)
    latent = torch.randn(1, 8)
    logits = []
    for data in (item, reverse):
        graph = graph_tensors(data, 64, 16, 8)
        products = graph.laplacian_pe[graph.source] * graph.laplacian_pe[graph.target]
        logits.append(model.decoder(latent, graph, node_structure(graph), products)["edge_logits"])
    assert (logits[0] - logits[1]).abs().min() > 0


def test_negatives_are_absent_type_correct_and_of_the_same_graph(make_graph: MakeGraph) -> None:
    batch = Batch.from_data_list(graphs(make_graph, (30, 20), (2, 1), (15, 40)))
    graph = graph_tensors(batch, 64, 16, 8)
    present = set(zip(graph.source.tolist(), graph.target.tolist()))
    for random in (False, True):
        sources, targets, absent = sample_negatives(graph, random)
        sources, targets = sources[absent], targets[absent]
        assert len(sources) > 0.8 * len(present)
        assert not present & set(zip(sources.tolist(), targets.tolist()))
        assert torch.equal(graph.graph_of_node[sources], graph.graph_of_node[targets])
        assert (graph.node_type[sources] != graph.node_type[targets]).all()


def test_only_x_and_edges_are_required() -> None:
    model = RebuiltGraphVAE(CONFIG)
    with pytest.warns(UserWarning, match="carries no stoichiometry, node_type, is_internal"):
        outputs = model(Data(x=torch.randn(5, 64), edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]])))
    assert torch.isfinite(outputs["loss"])
    assert all(value.item() == 0.0 for value in outputs["constraints"].values())


def test_training_fits_one_graph(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG, beta=1e-3)
    batch = Batch.from_data_list(graphs(make_graph, (9, 7)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    start = model.eval()(batch)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    end = model.eval()(batch)
    assert end["node_loss"].item() < 0.5 * start["node_loss"].item()
    assert end["edge_loss"].item() < 0.7 * start["edge_loss"].item()
    assert end["stoichiometry_loss"].item() < 0.5 * start["stoichiometry_loss"].item()
    assert end["constraints"]["mass_balance"].item() < 0.5 * start["constraints"]["mass_balance"].item()


def test_beta_weighs_the_divergence(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG).eval()
    batch = Batch.from_data_list(graphs(make_graph, (9, 7)))
    low, high = model(batch, beta=0.0), model(batch, beta=2.0)
    torch.testing.assert_close(high["loss"] - low["loss"], 2.0 * low["kl"][0])


def test_beta_rises_over_updates_and_survives_a_restart(make_graph: MakeGraph) -> None:
    model = RebuiltGraphVAE(CONFIG, beta=0.5, beta_warmup_steps=4)
    batch = Batch.from_data_list(graphs(make_graph, (9, 7)))

    def weight_of_update(model: RebuiltGraphVAE) -> float:
        seen = {float(model(batch)["beta"]) for _ in range(3)}  # micro-batches of one update
        model.after_update()
        assert len(seen) == 1
        return seen.pop()

    first = [weight_of_update(model) for _ in range(3)]
    assert model.eval()(batch)["beta"] == 0.5
    resumed = RebuiltGraphVAE(CONFIG, beta=0.5, beta_warmup_steps=4)
    resumed.load_state_dict(model.state_dict())
    assert [*first, *(weight_of_update(resumed) for _ in range(3))] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    outputs = resumed.train()(batch)
    parts = outputs["node_loss"] + outputs["edge_loss"] + outputs["stoichiometry_loss"] + 0.5 * outputs["kl"]
    balances = sum(outputs["constraints"].values())
    torch.testing.assert_close(outputs["loss_per_sample"], parts + CONFIG.constraint_weight * balances)
    constant = RebuiltGraphVAE(CONFIG, beta_warmup_steps=0)
    assert constant(batch)["beta"] == CONFIG.beta
    assert "beta_steps" not in constant.state_dict()


def test_checkpointing_changes_nothing(make_graph: MakeGraph) -> None:
    batch = Batch.from_data_list(graphs(make_graph, (9, 7), (6, 5)))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = RebuiltGraphVAE(CONFIG, use_gradient_checkpointing=checkpointing).eval()
        model(batch)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 3)}, "axis 'feature' has size 3, expected 64"),
        ({"laplacian_pe": torch.zeros(16, 2)}, "axis 'eigenvector'"),
        ({"edge_index": torch.tensor([[0], [99]]), "edge_attr": None, "stoichiometry": None}, "values from 0 to 99"),
        ({"stoichiometry": torch.zeros(3)}, "axis 'edge'"),
    ],
)
def test_wrong_input_names_the_axis(make_graph: MakeGraph, change: dict[str, Any], message: str) -> None:
    (item,) = graphs(make_graph, (9, 7))
    for name, value in change.items():
        setattr(item, name, value)
    with pytest.raises(ValueError, match=message):
        RebuiltGraphVAE(CONFIG)(item)
