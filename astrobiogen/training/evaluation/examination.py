"""The closing examination of a model: test figures, intervals, baselines, ablation."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from astrobiogen import data
from astrobiogen.training.batches import assemble
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.context import Setting
from astrobiogen.training.errors import NumericalError, UserError
from astrobiogen.training.evaluation import baselines, comparison, metrics, passes

_LOG = logging.getLogger("astrobiogen")
_CONTROL = "near-surface temperature"


def _baseline_probabilities(bundle: data.DatasetBundle, seed: int) -> dict[str, metrics.Floats]:
    """P(class 1) of every baseline on `bundle.test`, in its order."""
    train, validation, test = (
        baselines.baseline_inputs(samples) for samples in (bundle.train, bundle.validation, bundle.test)
    )
    for features, samples in ((train, bundle.train), (validation, bundle.validation), (test, bundle.test)):
        if bad := np.flatnonzero(~(np.isfinite(features.flat).all(1) & np.isfinite(features.params).all(1))).tolist():
            first = samples.pairs[bad[0]]
            raise NumericalError(
                f"baselines: features of {len(bad)} of {len(samples)} {samples.name} samples are NaN or Inf, of the "
                f"first: {first.climate}, {first.organism}; --evaluation.baselines false leaves the baselines out"
            )
    return baselines.predict(train, validation, test, seed)


def examine(
    assembly: assemble.Assembly,
    model: torch.nn.Module,
    setting: Setting,
    should_stop: Callable[[], bool] = lambda: False,
    seen: Callable[[passes.Evaluation], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, metrics.Predictions]] | None:
    """Test figures of `model` with intervals, baselines and ablation as JSON data, and the predictions behind them;
    None if `should_stop`, polled before each batch, said so, and in every process of the setting but the first: all
    share the passes over the data, the first draws the conclusions.

    Args:
        seen: told of the pass over the whole test set.

    Raises:
        UserError: the data set has no test samples.
    """
    test = assembly.bundle.test
    if not len(test):
        raise UserError("data: got 0 test samples, expected at least one", exit_code=1)
    config, world = setting.config, setting.world
    task, settings, seed = assembly.task, config.evaluation, config.seed
    run = functools.partial(
        passes.evaluate,
        *(model, task.loss_function),
        collate=task.collate,
        batch_size=settings.batch_size,
        device=setting.device,
        dtype=setting.dtype,
        should_stop=should_stop,
        world=world,
        what="test",
    )
    whole = run(test, order=assemble.evaluation_order(test, config), counts=assemble.TermCounts(test))
    if whole is None:
        return None
    limit = settings.ablation_limit or len(test)
    # All passes over the data come first: the other processes take part in them and are then done.
    hidden = _hidden(run, test, limit, config) if settings.ablation else {}
    if None in hidden.values() or not world.main:
        return None
    seen(whole)
    predictions = {"model": whole.predictions}
    result: dict[str, Any] = {
        "preset": config.preset,
        "seed": seed,
        "data": task.fingerprint,
        "interval_method": comparison.INTERVAL_METHOD,
        "bootstrap_replicates": settings.bootstrap,
        "model": comparison.by_cell(whole.predictions, settings.bootstrap, seed),
        "total_loss": whole.loss,
        "loss_parts": whole.parts,
        "fraction_rmse": whole.summary()["fraction_rmse"],
        "modality_weights": whole.modality_weights,
    }
    if settings.baselines:
        compared, others = _against_baselines(assembly.bundle, whole.predictions, config)
        result |= compared
        predictions |= others
    if settings.ablation:
        keep = np.isin(np.arange(len(test)), assemble.spread(len(test), limit))
        control = hidden.pop(_CONTROL)
        result["ablation"] = comparison.ablate(hidden, whole.predictions.select(keep), settings.bootstrap, seed)
        result["control"] = comparison.control(control.predictions, whole.predictions, settings.bootstrap, seed)
    return None if should_stop() else (result, predictions)


def _against_baselines(
    bundle: data.DatasetBundle, ours: metrics.Predictions, config: TrainConfig
) -> tuple[dict[str, Any], dict[str, metrics.Predictions]]:
    """What the baselines reach on the test set and how `ours` differ from them; and their predictions."""
    _LOG.info("fitting the baselines")
    probabilities = _baseline_probabilities(bundle, config.seed)
    compared = comparison.compare(ours, probabilities, config.evaluation.bootstrap, config.seed)
    result = {
        "baselines": compared,
        "against_majority_class": comparison.against_majority(compared),
        "against_additive_new_planet": comparison.against_additive(compared),
        "against_best_baseline": comparison.against_best(compared),
    }
    return result, {name: dataclasses.replace(ours, probability=p) for name, p in probabilities.items()}


def _hidden(
    run: Callable[..., passes.Evaluation | None], test: data.HabitatDataset, limit: int, config: TrainConfig
) -> dict[str, Any]:
    """`run` with each modality hidden, on `limit` samples, and with the near-surface temperature hidden, on all; None
    where it was stopped.
    """
    part = assemble.limited(test, limit)
    _LOG.info("masking one modality after the other on %d test samples", len(part))
    order = assemble.evaluation_order(part, config)
    results: dict[str, Any] = {
        name: run(part, order=order, masked=name, what=f"test without {name}") for name in passes.MODALITIES
    }
    order = assemble.evaluation_order(test, config)
    return results | {_CONTROL: run(data.without_near_surface(test), order=order, what=f"test without {_CONTROL}")}
