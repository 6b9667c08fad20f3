"""The typed batch and its validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from astrobiogen.data.errors import DataError
from astrobiogen.data.spec import DataSpec

if TYPE_CHECKING:
    from torch_geometric.data import Batch

IGNORE_INDEX = -100


class HabitatBatch(TypedDict):
    """What ``collate`` makes of B samples. Sizes: P planet parameters, V variables, T months, G epochs, W wavelengths,
    L tokens. A mask is True where something was measured; what is not is zero (``input_ids``: the pad id).
    """

    run_ids: Tensor  # long [B]
    planet_params: Tensor  # float32 [B, P], standardised
    planet_params_mask: Tensor  # bool [B, P]
    climate_datacube: Tensor  # float32 [B, V, T, G, lev, lat, lon], standardised
    climate_mask: Tensor  # bool [B, G]
    metabolic_graph: Batch  # B graphs
    graph_mask: Tensor  # bool [B]
    spectroscopy: Tensor  # float32 [B, W, 2]: wavelength in um, standardised albedo
    spectroscopy_mask: Tensor  # bool [B, W]
    input_ids: Tensor  # long [B, L]
    attention_mask: Tensor  # bool [B, L]
    labels: Tensor  # long [B, L], -100 where there is no token
    text_description: list[str]
    habitability_label: Tensor  # long [B], 0 or 1
    habitability_fraction: Tensor  # float32 [B], S
    modality_mask: Tensor  # bool [B, 5]: climate, graph, spectrum, text, planet_params
    metadata: list[dict[str, Any]]


def layout(batch: HabitatBatch, spec: DataSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Expected shape and dtype of every tensor of a batch; B and L are the batch's own."""
    b, length = len(batch["metadata"]), batch["input_ids"].shape[-1]
    v, t, g, lev, lat, lon = spec.cube_shape
    return {
        "run_ids": ((b,), torch.long),
        "planet_params": ((b, spec.n_planet_params), torch.float32),
        "planet_params_mask": ((b, spec.n_planet_params), torch.bool),
        "climate_datacube": ((b, v, t, g, lev, lat, lon), torch.float32),
        "climate_mask": ((b, g), torch.bool),
        "graph_mask": ((b,), torch.bool),
        "spectroscopy": ((b, spec.n_wavelengths, 2), torch.float32),
        "spectroscopy_mask": ((b, spec.n_wavelengths), torch.bool),
        "input_ids": ((b, length), torch.long),
        "attention_mask": ((b, length), torch.bool),
        "labels": ((b, length), torch.long),
        "habitability_label": ((b,), torch.long),
        "habitability_fraction": ((b,), torch.float32),
        "modality_mask": ((b, 5), torch.bool),
    }


def validate(batch: HabitatBatch, spec: DataSpec) -> HabitatBatch:
    """``batch`` itself, after checking keys, shapes, dtypes, finite values, ranges and the agreement of the masks.

    Raises:
        DataError: The first disagreement, by key.
    """
    if missing := sorted(HabitatBatch.__required_keys__ - set(batch)):
        raise DataError("batch", missing[0], f"missing; the batch holds {sorted(batch)}")
    if unknown := sorted(set(batch) - HabitatBatch.__required_keys__):
        raise DataError("batch", unknown[0], "unknown key")
    for name, (shape, dtype) in layout(batch, spec).items():
        value = batch[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise DataError("batch", name, f"{value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DataError("batch", name, f"{int((~value.isfinite()).sum())} values are NaN or infinite")
    _check_values(batch, spec)
    _check_masks(batch)
    return batch


def _check_values(batch: HabitatBatch, spec: DataSpec) -> None:
    ids, labels = batch["input_ids"], batch["labels"]
    if int(ids.min()) < 0 or int(ids.max()) >= spec.vocab_size:
        raise DataError("batch", "input_ids", f"{int(ids.min())} to {int(ids.max())}, vocabulary {spec.vocab_size}")
    if not torch.equal(labels, ids.masked_fill(~batch["attention_mask"], IGNORE_INDEX)):
        raise DataError("batch", "labels", "are not input_ids with -100 where attention_mask is False")
    if not bool(((batch["habitability_label"] == 0) | (batch["habitability_label"] == 1)).all()):
        raise DataError("batch", "habitability_label", "holds other values than 0 and 1")
    fraction = batch["habitability_fraction"]
    if not bool(((fraction >= 0) & (fraction <= 1)).all()):
        raise DataError(
            "batch", "habitability_fraction", f"{fraction.min():.3g} to {fraction.max():.3g}, not in [0, 1]"
        )
    graphs = batch["metabolic_graph"]
    x: Tensor | None = getattr(graphs, "x", None)
    if graphs.num_graphs != len(batch["metadata"]) or x is None or x.shape[1] != spec.node_features:
        shape = None if x is None else tuple(x.shape)
        raise DataError("batch", "metabolic_graph", f"{graphs.num_graphs} graphs, x {shape}")
    if not bool(x.isfinite().all()):
        raise DataError("batch", "metabolic_graph", "x holds NaN or infinite values")


def _check_masks(batch: HabitatBatch) -> None:
    """An absent modality is zero, and ``modality_mask`` says what the other masks say."""
    absent = ~batch["climate_mask"]
    if absent.any() and bool(batch["climate_datacube"].transpose(1, 3)[absent.nonzero(as_tuple=True)].any()):
        raise DataError("batch", "climate_datacube", "is not zero where climate_mask is False")
    if bool(batch["planet_params"][~batch["planet_params_mask"]].any()):
        raise DataError("batch", "planet_params", "is not zero where planet_params_mask is False")
    if bool(batch["spectroscopy"][..., 1][~batch["spectroscopy_mask"]].any()):
        raise DataError("batch", "spectroscopy", "is not zero where spectroscopy_mask is False")
    parts = (
        batch["climate_mask"].any(1),
        batch["graph_mask"],
        batch["spectroscopy_mask"].any(1),
        batch["attention_mask"].any(1),
        batch["planet_params_mask"].any(1),
    )
    if not torch.equal(batch["modality_mask"], torch.stack(parts, dim=1)):
        raise DataError("batch", "modality_mask", "disagrees with the masks of the modalities")
