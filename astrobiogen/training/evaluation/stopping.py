"""When training ends, and which model is the best: pure functions of the progress and the last validation."""

import math

from astrobiogen.training.config import StopConfig, TrainConfig
from astrobiogen.training.evaluation import metrics, passes
from astrobiogen.training.evaluation.progress import Progress

TIME_LIMIT = "time limit"


def judge(progress: Progress, stop: StopConfig, result: passes.Evaluation) -> bool:
    """Whether `result` is better than that of the best model stored so far, which by the metric "last" the newest one
    always is. A figure that is not defined, as AUROC of one class, is not.
    """
    if stop.metric == "last":
        return True
    value = result.figure(stop.metric)
    return math.isfinite(value) and (progress.best is None or _better(stop, value, progress.best))


def enter(progress: Progress, stop: StopConfig, result: passes.Evaluation, stored: bool) -> None:
    """Enter `result` into `progress`: into the best value if its model was `stored` as the best one, and into the
    patience, to which a figure that is not defined says nothing.
    """
    value = result.figure("class_loss" if stop.metric == "last" else stop.metric)
    if stored:
        progress.best, progress.best_epoch = value, progress.epoch
    if stop.metric == "last" or not math.isfinite(value):
        return
    if progress.seen is None or _better(stop, value, progress.seen, by=stop.min_delta):
        progress.seen, progress.bad_epochs = value, 0
    else:
        progress.bad_epochs += 1


def _better(stop: StopConfig, value: float, than: float, by: float = 0.0) -> bool:
    """Whether `value` is better by more than `by`."""
    return than - value > by if stop.metric in ("loss", "class_loss") else value - than > by


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
