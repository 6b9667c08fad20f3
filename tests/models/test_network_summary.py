"""Summaries of metabolic networks: their familiarity for known and new ones, the state dict, and what they do."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from astrobiogen.models import MODALITIES, UnifiedMultiModalSystem, presets
from astrobiogen.models.graph.inputs import GraphTensors, graph_tensors
from astrobiogen.models.graph.summary import TRUST, NetworkSummary

CERTAIN = torch.tensor(TRUST[1]).item()
MakeGraph = Callable[..., Data]


def tensors(graphs: Sequence[Data]) -> GraphTensors:
    return graph_tensors(Batch.from_data_list([*graphs]), 64, 16, 8)


def familiar(summary: NetworkSummary, graphs: list[Data]) -> torch.Tensor:
    return summary(tensors(graphs))["familiarity"]


def networks(make_graph: MakeGraph, count: int, seed: int) -> list[Data]:
    generator = torch.Generator().manual_seed(seed)
    return [make_graph(30 + 3 * number, 20 + number, generator) for number in range(count)]


def test_known_networks_have_one_in_any_batch_and_others_less(make_graph: MakeGraph) -> None:
    known, new = networks(make_graph, 8, 0), networks(make_graph, 5, 1)
    summary = NetworkSummary(64, 6)
    assert familiar(summary, new).tolist() == [1.0] * 5  # nothing remembered: no doubt
    summary.remember(tensors(known))
    assert familiar(summary, [known[5], new[0], known[2]])[[0, 2]].tolist() == [CERTAIN, CERTAIN]
    assert familiar(summary, new).max() < 0.5
    near = known[3].clone()
    assert near.x is not None
    near.x = near.x + 1e-3 * torch.randn_like(near.x)
    value = familiar(summary, [near]).item()
    assert 0.75 < value < CERTAIN


def test_the_formula(make_graph: MakeGraph) -> None:
    known, new = networks(make_graph, 6, 2), networks(make_graph, 3, 3)
    summary = NetworkSummary(64, 6)
    summary.remember(tensors(known))

    def describe(graph: Data) -> torch.Tensor:
        assert graph.x is not None
        kinds = [graph.x[graph.node_type == kind].double() for kind in (0, 1)]
        counts = torch.tensor([len(kind) for kind in kinds]).double().log1p()
        return torch.cat([*(kind.mean(0) for kind in kinds), counts])

    one = torch.stack([describe(graph) for graph in known])
    mean, scale = one.mean(0), one.std(0, correction=0)
    one = (one - mean) / scale
    between = torch.cdist(one, one) / one.shape[1] ** 0.5
    width = 0.5 * between.fill_diagonal_(torch.inf).min(1).values.median()
    other = torch.stack([(describe(graph) - mean) / scale for graph in new])
    distance = torch.cdist(other, one).min(1).values / one.shape[1] ** 0.5
    expected = 0.2 + 0.6 * (-0.5 * (distance / width).square()).exp()
    torch.testing.assert_close(familiar(summary, new).double(), expected, rtol=1e-3, atol=1e-7)


def test_the_state_dict_brings_its_own_number_of_networks(make_graph: MakeGraph) -> None:
    first, second = NetworkSummary(64, 6), NetworkSummary(64, 6)
    known, new = networks(make_graph, 7, 0), networks(make_graph, 4, 1)
    first.remember(tensors(known))
    second.remember(tensors(known[:2]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(familiar(second, new), familiar(first, new))
    features = [summary(tensors(new))["summary_features"] for summary in (first, second)]
    assert torch.equal(*features)


@pytest.mark.parametrize("count", [1, 2])
def test_few_or_equal_networks_are_no_problem(make_graph: MakeGraph, count: int) -> None:
    summary = NetworkSummary(64, 6)
    known = networks(make_graph, 1, 0) * count
    summary.remember(tensors(known))
    assert familiar(summary, known).tolist() == [CERTAIN] * count
    assert 0.19 < familiar(summary, networks(make_graph, 1, 5)).item() < CERTAIN


def test_an_unknown_network_counts_as_hidden_and_both_fusions_are_averaged(
    make_spec: Any, make_batch: Callable[..., dict[str, Any]]
) -> None:
    spec = make_spec()
    torch.manual_seed(0)
    system = UnifiedMultiModalSystem(presets.tiny(spec)).eval()
    batch = make_batch(3, spec)
    strangers = make_batch(3, spec, seed=7, graph_sizes=((90, 80), (70, 60), (50, 90)))
    system.remember_networks(strangers["metabolic_graph"])
    outputs = system(batch)
    familiarity = {"graph": outputs["graph_vae_outputs"]["familiarity"]}
    assert familiarity["graph"].max() < 0.5
    simple = {
        "climate": outputs["cnn_outputs"]["statistics_features"],
        "graph": outputs["graph_vae_outputs"]["summary_features"],
    }
    names = {"climate": "climate", "graph": "graph", "spectrum": "spectral", "planet_params": "planet", "text": "llm"}
    features = {name: outputs[f"{kind}_features"] for name, kind in names.items()}
    first, second = system.fusion(features, None, familiarity), system.summary_fusion(simple, None, familiarity)
    expected = 0.25 * first["logits"].softmax(-1) + 0.75 * second["logits"].softmax(-1)
    torch.testing.assert_close(outputs["logits"].softmax(-1), expected)
    torch.testing.assert_close(outputs["regression"], 0.25 * first["regression"] + 0.75 * second["regression"])
    # where a sample has neither climate nor graph, the whole fusion answers alone
    bare = {"climate_mask": torch.zeros_like(batch["climate_mask"]), "graph_mask": torch.zeros(3, dtype=torch.bool)}
    outputs = system(batch | bare)
    features = {name: outputs[f"{kind}_features"] for name, kind in names.items()}
    present = {name: outputs["present"][:, number] for number, name in enumerate(MODALITIES)}
    alone = system.fusion(features, present)["logits"]
    torch.testing.assert_close(outputs["logits"].softmax(-1), alone.softmax(-1))


def test_remembering_needs_the_switch(make_spec: Any, make_batch: Callable[..., dict[str, Any]]) -> None:
    spec = make_spec()
    system = UnifiedMultiModalSystem(dataclasses.replace(presets.tiny(spec), use_network_summary=False))
    with pytest.raises(ValueError, match="use_network_summary is off"):
        system.remember_networks(make_batch(2, spec)["metabolic_graph"])
