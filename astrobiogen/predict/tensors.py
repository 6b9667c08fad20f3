"""Batches as flat dictionaries of tensors: what a model takes when nothing but tensors may go in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Of a batch in which every climate and network stands once: see `training.batches.shared_items.collate_shared`.
CLIMATES = ("climate_datacube", "climate_mask")
PAIRS = (
    "climate_index", "graph_index", "graph_mask", "modality_mask", "planet_params", "planet_params_mask",
    "spectroscopy", "spectroscopy_mask", "input_ids", "attention_mask",
)  # fmt: skip
NETWORKS = (
    "x", "edge_index", "edge_attr", "stoichiometry", "node_type", "laplacian_pe", "random_walk_pe", "is_internal",
    "elements", "formula_known", "charge", "charge_known",
)  # fmt: skip
_OF_GRAPH, _KNOWN = "network.graph_of_node", "network.known"


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a batch by the names that the graph encoder reads; `known` has one entry per network."""

    tensors: Mapping[str, Tensor]
    batch: Tensor
    num_graphs: int

    def __getattr__(self, name: str) -> Tensor:
        """A tensor of the networks."""
        if name not in NETWORKS:
            raise AttributeError(name)
        return self.tensors[name]


def flattened(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch of `collate_shared`, those of its networks under `network.NAME`; no labels."""
    networks = batch["metabolic_graph"]
    found = {name: batch[name] for name in (*CLIMATES, *PAIRS)}
    found |= {f"network.{name}": networks[name] for name in NETWORKS}
    known = torch.ones(networks.num_graphs, dtype=torch.bool, device=networks.x.device)
    return found | {_OF_GRAPH: networks.batch, _KNOWN: known}


def batch_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch that `flattened` has taken apart, for the model's forward."""
    networks = {name: tensors[f"network.{name}"] for name in NETWORKS}
    batch: dict[str, Any] = {name: tensors[name] for name in (*CLIMATES, *PAIRS)}
    return batch | {"metabolic_graph": Networks(networks, tensors[_OF_GRAPH], tensors[_KNOWN].shape[0])}
