"""Learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017): raise the rate
geometrically from update to update and watch the loss."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure

from astrobiogen.training import loading, run_folder
from astrobiogen.training.config import ScheduleConfig, TrainConfig
from astrobiogen.training.distributed import World
from astrobiogen.training.distributed_model import Parallel
from astrobiogen.training.distributed_share import Round, rounds
from astrobiogen.training.errors import UserError
from astrobiogen.training.optimizer import build_optimizer
from astrobiogen.training.state import Task
from astrobiogen.training.update import Updater, WindowFactors

_LOG = logging.getLogger("astrobiogen")
LOWEST, HIGHEST, UPDATES = 1e-7, 1.0, 100
_SMOOTHING = 0.9
_DIVERGED = 3.0  # the test ends when the smoothed loss is this many times its minimum
_SAFETY = 10.0


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What the test found.

    Attributes:
        rates, losses: of each update taken; the loss is smoothed.
        steepest: rate at which the loss falls fastest per factor of the rate.
        suggestion: a tenth of the rate with the lowest loss, or `steepest` if that is less: a peak for the schedule.
    """

    rates: list[float]
    losses: list[float]
    steepest: float
    suggestion: float


def _windows(task: Task, config: TrainConfig, device: torch.device) -> Iterator[tuple[Round, loading.Batch]]:
    """Micro-batches in the order of training, epoch after epoch."""
    epoch = 0
    while True:
        order = list(task.sampler.batches(epoch))
        todo = rounds(order, 0, config.data.accumulation, 1)
        shares = [shared.share(0) for shared in todo]
        loaded = loading.load_batches(task.train, task.collate, shares, device, config.data.workers)
        for shared, (_, batch) in zip(todo, loaded, strict=True):
            yield shared, batch
        epoch += 1


def analyse(rates: list[float], losses: list[float]) -> RangeTest:
    """Smooth `losses`, cut them where they diverge, and read off the rates.

    Raises:
        UserError: too few points, or the loss never falls.
    """
    smooth: list[float] = []
    average = 0.0
    for number, loss in enumerate(losses):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smooth.append(average / (1 - _SMOOTHING ** (number + 1)))
        if not math.isfinite(loss) or smooth[-1] > _DIVERGED * min(smooth):
            smooth.pop()
            break
    rates = rates[: len(smooth)]
    if len(smooth) < 10:
        raise UserError(f"--find-lr: the loss diverged after {len(smooth)} updates, expected at least 10", exit_code=1)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    slopes = {
        number: (smooth[number + 1] - smooth[number - 1]) / math.log(rates[number + 1] / rates[number - 1])
        for number in range(1, min(lowest + 1, len(smooth) - 1))
    }
    if not slopes or min(slopes.values()) >= 0:
        raise UserError("--find-lr: the loss never fell; check the data and the model", exit_code=1)
    steepest = rates[min(slopes, key=slopes.__getitem__)]
    return RangeTest(rates, smooth, steepest, min(steepest, rates[lowest] / _SAFETY))


def find(
    task: Task,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int, float, float], None] = lambda *_: None,
) -> RangeTest:
    """Run the test on `task`'s model, whose weights are spent by it.

    Args:
        advance: told (update, rate, loss) after each update.

    Raises:
        UserError: see `analyse`.
    """
    config = dataclasses.replace(config, schedule=ScheduleConfig(name="constant"))
    model = task.model.to(device).train()
    parallel = Parallel(model, task.loss_function, World(), config.distributed, device, dtype)
    updater = Updater(parallel, build_optimizer(model, config.optimizer), config, UPDATES, device, dtype)
    factors = WindowFactors(task.counts)
    rates: list[float] = []
    losses: list[float] = []
    ratio = (HIGHEST / LOWEST) ** (1 / (UPDATES - 1))
    for shared, batch in _windows(task, config, device):
        updater.peak_rate = LOWEST * ratio ** len(rates)
        updater.add(shared, batch, factors(shared, shared.share(0)))
        if not shared.closes:
            continue
        result = updater.finish()
        rates.append(result.rate)
        losses.append(math.nan if result.skipped else result.means["loss"])
        advance(len(rates), result.rate, losses[-1])
        diverged = not math.isfinite(losses[-1]) or losses[-1] > 2 * _DIVERGED * min(losses)
        if len(rates) == UPDATES or (diverged and len(rates) > 10):
            break
    return analyse(rates, losses)


def publish(result: RangeTest, folder: Path) -> None:
    """Write lr_finder.json and lr_finder.png."""
    run_folder.write_json(folder / "lr_finder.json", dataclasses.asdict(result))
    figure = Figure(figsize=(6.4, 4.0))
    axis = figure.add_subplot()
    axis.plot(result.rates, result.losses, color="#1f6feb")
    axis.axvline(result.suggestion, color="#d1661a", linestyle="--", label=f"suggestion {result.suggestion:.1e}")
    axis.axvline(result.steepest, color="#8c959f", linestyle=":", label=f"steepest fall {result.steepest:.1e}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="total loss, smoothed", title="Learning-rate range test")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "lr_finder.png", dpi=120)
