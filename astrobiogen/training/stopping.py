"""When training ends, and which model is the best: pure functions of the progress and the last validation."""

import math

from astrobiogen.training import evaluation, metrics
from astrobiogen.training.config import StopConfig, TrainConfig
from astrobiogen.training.state import Progress

TIME_LIMIT = "time limit"


def judge(progress: Progress, stop: StopConfig, result: evaluation.Evaluation) -> bool:
    """Enter `result` into the best value and the patience of `progress`; True if it is the best so far, which
    by the metric "last" the newest one always is.
    """
    if stop.metric == "last":
        progress.best, progress.best_epoch = result.figure("class_loss"), progress.epoch
        return True
    value = result.figure(stop.metric)
    sign = -1.0 if stop.metric in ("loss", "class_loss") else 1.0
    better = math.isfinite(value) and (progress.best is None or sign * value > sign * progress.best)
    if better:
        progress.best, progress.best_epoch, progress.bad_epochs = value, progress.epoch, 0
    else:
        progress.bad_epochs += 1
    return better


def reason(progress: Progress, config: TrainConfig, predictions: metrics.Predictions) -> str:
    """Why training ends after the epochs that `progress` counts; empty if it goes on."""
    stop = config.stop
    if progress.epoch >= config.epochs:
        return "all epochs done"
    if stop.patience and progress.bad_epochs >= stop.patience:
        return f"early: no better {stop.metric} for {stop.patience} epochs"
    if stop.target_accuracy < 1 and metrics.accuracy_lower_bound(predictions, config.seed) >= stop.target_accuracy:
        return f"target: validation accuracy is at least {stop.target_accuracy:g} with 95 % confidence"
    return ""


def time_limit(progress: Progress, config: TrainConfig) -> bool:
    """Whether the wall-clock limit has passed."""
    return progress.seconds > config.stop.max_hours * 3600


def describe_limit(progress: Progress, config: TrainConfig) -> str:
    """Why training ends at the wall-clock limit."""
    limit = f"{TIME_LIMIT} (stop.max_hours {config.stop.max_hours:g})"
    return f"{limit} in epoch {progress.epoch + 1} of {config.epochs}"
