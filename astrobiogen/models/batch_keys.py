"""Keys of a batch: which there are, how many samples it has, and results per item made results per sample."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

PER_ITEM = (
    "features", "reconstruction_loss", "physics_violations", "physics_loss", "mu", "logvar", "z", "node_loss",
    "edge_loss", "stoichiometry_loss", "kl", "constraints", "loss_per_sample", "statistics_features",
    "summary_features", "familiarity",
)  # fmt: skip
# What a forward call and the loss read, and what `astrobiogen.data` adds for people.
BATCH_KEYS = (
    "run_ids", "planet_params", "planet_params_mask", "climate_datacube", "climate_mask", "climate_index",
    "metabolic_graph", "graph_mask", "graph_index", "spectroscopy", "spectroscopy_mask", "input_ids", "attention_mask",
    "labels", "text_rows", "text_description", "habitability_label", "habitability_fraction", "modality_mask",
    "metadata",
)  # fmt: skip


def check_keys(batch: Mapping[str, Any], known: Collection[str] = BATCH_KEYS) -> None:
    """ValueError naming the keys of `batch` that are not `known`, each with the nearest that is."""
    unknown = [key for key in batch if key not in known]
    if not unknown:
        return
    hints = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, 1)
        hints.append(f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key))
    raise ValueError(f"batch: unknown keys {', '.join(hints)}; expected some of {sorted(known)}")


def batch_size(batch: dict[str, Any]) -> int:
    """Number of samples B in a batch.

    Raises:
        ValueError: the batch has no key that tells.
    """
    for key in ("run_ids", "habitability_label", "modality_mask", "climate_index", "graph_index", "planet_params",
                "spectroscopy", "input_ids", "climate_datacube"):  # fmt: skip
        if batch.get(key) is not None:
            return int(batch[key].shape[0])
    if batch.get("metabolic_graph") is not None:
        return int(batch["metabolic_graph"].num_graphs)
    raise ValueError(f"batch holds no modality and no run_ids; its keys are {sorted(batch)}")


def per_sample(outputs: dict[str, Any], batch: dict[str, Any], index_key: str) -> dict[str, Any]:
    """Give the entries of `PER_ITEM` one row per sample where the batch holds each distinct item once."""
    index = batch.get(index_key)
    if index is None:
        return outputs
    expanded = dict(outputs)
    for name in PER_ITEM:
        value = outputs.get(name)
        if isinstance(value, dict):
            expanded[name] = {key: entry[index] for key, entry in value.items()}
        elif value is not None:
            expanded[name] = value[index]
    return expanded
