"""The closing examination of a trained model: test cells, intervals, baselines, ablation."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from astrobiogen.training.evaluation import metrics, passes

_LOG = logging.getLogger("astrobiogen")
INTERVAL_METHOD = (
    "95 % intervals: two-way cluster bootstrap over star systems and species (pigeonhole bootstrap); "
    "differences are paired on the same replicates"
)
ALL_CELLS = "all"
ADDITIVE = "planet + organism effects"
CONTROL = "model, no near-surface temperature"


def _table(predictions: metrics.Predictions, replicates: int, seed: int) -> dict[str, Any]:
    intervals = metrics.with_intervals(predictions, replicates, seed)
    return {
        "samples": len(predictions.label),
        "positive_share": float(predictions.label.mean()),
        "planets": len(np.unique(predictions.planet)),
        "organisms": len(np.unique(predictions.organism)),
        **{name: interval.as_dict() for name, interval in intervals.items()},
    }


def by_cell(predictions: metrics.Predictions, replicates: int, seed: int) -> dict[str, Any]:
    """Figures with intervals over all samples and for each test cell."""
    result = {ALL_CELLS: _table(predictions, replicates, seed)}
    cells = np.asarray(predictions.cell)
    for cell in sorted(set(predictions.cell)):
        result[cell] = _table(predictions.select(cells == cell), replicates, seed)
    return result


def _hardened(predictions: metrics.Predictions, probability: metrics.Floats) -> metrics.Predictions:
    return metrics.Predictions(
        np.asarray(probability, np.float64),
        predictions.label,
        predictions.planet,
        predictions.organism,
        predictions.cell,
    )


def compare(
    model: metrics.Predictions, probabilities: Mapping[str, metrics.Floats], replicates: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Each baseline's figures by cell, and the model's paired difference from it, over all samples and by cell."""
    result: dict[str, dict[str, Any]] = {}
    for name, probability in probabilities.items():
        other = _hardened(model, probability)
        result[name] = {
            "cells": by_cell(other, replicates, seed),
            "model_minus_baseline": {
                key: value.as_dict() for key, value in metrics.differences(model, other, replicates, seed).items()
            },
        }
        if name == ADDITIVE:
            result[name]["model_minus_baseline_by_cell"] = differences_by_cell(model, other, replicates, seed)
    return result


def differences_by_cell(
    ours: metrics.Predictions, other: metrics.Predictions, replicates: int, seed: int
) -> dict[str, dict[str, Any]]:
    """ours - other with intervals for each test cell."""
    cells = np.asarray(ours.cell)
    result: dict[str, dict[str, Any]] = {}
    for cell in sorted(set(ours.cell)):
        pair = (ours.select(cells == cell), other.select(cells == cell))
        result[cell] = {key: item.as_dict() for key, item in metrics.differences(*pair, replicates, seed).items()}
    return result


def control(hidden: metrics.Predictions, whole: metrics.Predictions, replicates: int, seed: int) -> dict[str, Any]:
    """Figures by cell of the model on data without near-surface temperature, and what it loses by that."""
    change = metrics.differences(hidden, whole, replicates, seed)
    return {
        "cells": by_cell(hidden, replicates, seed),
        "masked_minus_whole": {key: value.as_dict() for key, value in change.items()},
    }


def ablate(
    results: Mapping[str, passes.Evaluation], whole: metrics.Predictions, replicates: int, seed: int
) -> dict[str, Any]:
    """Figures with each modality masked at evaluation, and the paired difference from `whole`, the predictions on the
    same samples with nothing masked; the model is not retrained.

    Args:
        results: for each modality the evaluation with it hidden.
    """
    result: dict[str, Any] = {}
    for name, masked in results.items():
        change = metrics.differences(masked.predictions, whole, replicates, seed)
        result[name] = {
            "samples": len(whole.label),
            "figures": {key: float(value[0]) for key, value in metrics.figures(masked.predictions).items()},
            "masked_minus_whole": {key: value.as_dict() for key, value in change.items()},
            "modality_weights": masked.modality_weights,
        }
    return result


def against_majority(comparison: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's paired difference from the majority class in accuracy, AUROC and cross-entropy ("loss"), and whether
    it is better by more than the 95 % interval of that difference allows for chance.
    """
    return verdicts(comparison["majority class"]["model_minus_baseline"])


def against_additive(comparison: Mapping[str, Any], cell: str = "new_planet") -> dict[str, dict[str, Any]] | None:
    """The same against additive planet and organism effects in one test cell; None where the cell or the baseline is
    absent. A claim for several modalities must be better here.
    """
    found = comparison.get(ADDITIVE, {}).get("model_minus_baseline_by_cell", {}).get(cell)
    return verdicts(found) if found is not None else None


def against_best(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The same against the baseline with the lowest cross-entropy on this very test set, and its name: picked by what
    the claim is about, so that no stronger one is left unsaid.
    """
    name = min(comparison, key=lambda baseline: comparison[baseline]["cells"][ALL_CELLS]["loss"]["value"])
    return {"baseline": name, "difference": verdicts(comparison[name]["model_minus_baseline"])}


def verdicts(differences: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Paired differences in accuracy, AUROC and cross-entropy with whether each is better or worse outside its
    interval.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, larger_is_better in (("accuracy", True), ("auroc", True), ("loss", False)):
        item = differences[name]
        above = item["low"] is not None and item["low"] > 0
        below = item["high"] is not None and item["high"] < 0
        better, worse = (above, below) if larger_is_better else (below, above)
        result[name] = {**item, "better": better, "worse": worse}
    return result
