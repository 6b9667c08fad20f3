"""Learning rate and momentum as pure functions of the number of updates, so that resuming needs no scheduler state."""

import math

import torch

from astrobiogen.training.config import ScheduleConfig


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * progress) + 1)


def learning_rate(config: ScheduleConfig, peak: float, update: int, total: int) -> float:
    """Rate of the update number `update` (from 0) out of `total`.

    `onecycle` equals `torch.optim.lr_scheduler.OneCycleLR(max_lr=peak, total_steps=total, pct_start=warmup_fraction,
    div_factor=start_division, final_div_factor=final_division)` at the same step.
    """
    if config.name == "constant":
        return peak
    start, end = peak / config.start_division, peak / config.start_division / config.final_division
    top = max(config.warmup_fraction * total - 1, 0.0)
    last = max(total - 1, 1)
    update = min(update, last)
    if update <= top and top > 0:
        progress = update / top
        return _cosine(start, peak, progress) if config.name == "onecycle" else start + (peak - start) * progress
    return _cosine(peak, end, (update - top) / max(last - top, 1e-9))


def momentum(config: ScheduleConfig, update: int, total: int) -> float | None:
    """beta1 of the update number `update`, or None where the schedule leaves it to the optimizer."""
    if config.name != "onecycle" or not config.cycle_momentum:
        return None
    top = max(config.warmup_fraction * total - 1, 0.0)
    last = max(total - 1, 1)
    update = min(update, last)
    if update <= top and top > 0:
        return _cosine(config.max_momentum, config.base_momentum, update / top)
    return _cosine(config.base_momentum, config.max_momentum, (update - top) / max(last - top, 1e-9))


def apply(config: ScheduleConfig, optimizer: torch.optim.Optimizer, peak: float, update: int, total: int) -> float:
    """Set the rate (and beta1, if the schedule owns it) of every group for the coming update; returns the rate."""
    rate, beta1 = learning_rate(config, peak, update, total), momentum(config, update, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])
    return rate
