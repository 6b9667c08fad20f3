"""Samples to a batch of the documented keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from astrobiogen.data.batches.batch import IGNORE_INDEX
from astrobiogen.data.dataset import Sample
from astrobiogen.data.errors import DataError
from astrobiogen.data.networks import geometric

if TYPE_CHECKING:
    from torch_geometric.data import Data

MODALITIES = ("climate", "graph", "spectrum", "text", "planet_params")
# An absent modality still needs tensors of the right rank: a cube of zeros, one lone node without edges, a spectrum of
# zeros, one pad token.
GRAPH_WIDTHS = {"x": 64, "laplacian_pe": 16, "random_walk_pe": 8, "elements": 8}
Sizes = tuple[int, ...]


def empty_graph() -> Data:
    """A graph of one zero node, standing for an absent network."""
    wide = {name: torch.zeros(1, width) for name, width in GRAPH_WIDTHS.items()}
    return geometric.graph(
        edge_index=torch.zeros(2, 0, dtype=torch.long),
        edge_attr=torch.zeros(0, 2),
        stoichiometry=torch.zeros(0),
        node_type=torch.zeros(1, dtype=torch.long),
        is_internal=torch.zeros(1, dtype=torch.bool),
        formula_known=torch.zeros(1, dtype=torch.bool),
        charge=torch.zeros(1),
        charge_known=torch.zeros(1, dtype=torch.bool),
        num_nodes=1,
        **wide,
    )


def _cubes(samples: Sequence[Sample], shape: Sizes) -> tuple[Tensor, Tensor]:
    """Cube [B, V, T, G, lev, lat, lon] and mask [B, G]; each present epoch is copied once, absent ones are zeroed."""
    v, t, *rest = shape
    g = len(samples[0].epochs)
    cube = torch.empty(len(samples), v, t, g, *rest)
    mask = torch.zeros(len(samples), g, dtype=torch.bool)
    for b, sample in enumerate(samples):
        for k, epoch in enumerate(sample.epochs):
            if epoch is None:
                cube[b, :, :, k].zero_()
            elif tuple(epoch.shape) != shape:
                raise DataError(
                    str(sample.metadata), "climate_datacube", f"shape {tuple(epoch.shape)}, expected {shape}"
                )
            else:
                cube[b, :, :, k].copy_(epoch)
                mask[b, k] = True
    return cube, mask


def _text(samples: Sequence[Sample], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    length = max(1, *(s.input_ids.numel() for s in samples))
    ids = torch.full((len(samples), length), pad_id, dtype=torch.long)
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    for b, sample in enumerate(samples):
        n = sample.input_ids.numel()
        ids[b, :n] = sample.input_ids
        mask[b, :n] = True
    return ids, mask, ids.masked_fill(~mask, IGNORE_INDEX)


def collate(samples: Sequence[Sample], pad_id: int = 0, cube_shape: Sizes = (2, 12, 10, 32, 64)) -> dict[str, Any]:
    """Batch of samples.

    Args:
        samples: At least one; all from datasets with the same spec.
        pad_id: Id of the padding token (0 in every tokenizer that ``build`` makes).
        cube_shape: (V, T, lev, lat, lon), for batches in which no sample has a cube.

    Returns:
        run_ids long [B]; planet_params [B, P] with planet_params_mask; climate_datacube [B, V, T, G, lev, lat,
            lon] with climate_mask [B, G]; metabolic_graph (``Batch``) with graph_mask [B]; spectroscopy [B, W, 2] with
            spectroscopy_mask [B, W]; input_ids, attention_mask, labels [B, L]; text_description; habitability_label
            long [B]; habitability_fraction [B]; modality_mask bool [B, 5] in the order climate, graph, spectrum, text,
            planet_params; metadata.

    Raises:
        DataError: No samples, or a cube of another shape.
    """
    if not samples:
        raise DataError("collate", "samples", "got an empty list, expected at least one sample")
    present = next((e for s in samples for e in s.epochs if e is not None), None)
    cube, climate_mask = _cubes(samples, tuple(present.shape) if present is not None else cube_shape)
    ids, attention_mask, labels = _text(samples, pad_id)
    params_mask = torch.stack([s.planet_params_mask for s in samples])
    spectrum_mask = torch.stack([s.spectrum_mask for s in samples])
    graph_mask = torch.tensor([s.graph is not None for s in samples])
    graphs = [s.graph if s.graph is not None else empty_graph() for s in samples]
    modality = torch.stack(
        [climate_mask.any(1), graph_mask, spectrum_mask.any(1), attention_mask.any(1), params_mask.any(1)], dim=1
    )
    return {
        "run_ids": torch.tensor([s.run_id for s in samples], dtype=torch.long),
        "planet_params": torch.stack([s.planet_params for s in samples]),
        "planet_params_mask": params_mask,
        "climate_datacube": cube,
        "climate_mask": climate_mask,
        "metabolic_graph": geometric.batch(graphs),
        "graph_mask": graph_mask,
        "spectroscopy": torch.stack([s.spectrum for s in samples]),
        "spectroscopy_mask": spectrum_mask,
        "input_ids": ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "text_description": [s.text for s in samples],
        "habitability_label": torch.tensor([s.label for s in samples], dtype=torch.long),
        "habitability_fraction": torch.tensor([s.fraction for s in samples], dtype=torch.float32),
        "modality_mask": modality,
        "metadata": [s.metadata for s in samples],
    }
