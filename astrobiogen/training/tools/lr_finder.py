"""Learning-rate range test (Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017): raise the rate
geometrically from update to update and watch the loss."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from astrobiogen.training.batches import loading
from astrobiogen.training.batches.task import Task
from astrobiogen.training.batches.weighting import Weighting
from astrobiogen.training.config import ScheduleConfig, TrainConfig, run_folder
from astrobiogen.training.distributed import World
from astrobiogen.training.distributed.model import Parallel
from astrobiogen.training.distributed.share import Round, rounds
from astrobiogen.training.errors import UserError
from astrobiogen.training.optim.optimizer import build_optimizer
from astrobiogen.training.update import Updater

_LOG = logging.getLogger("astrobiogen")
LOWEST, HIGHEST, UPDATES = 1e-6, 1.0, 100
_WIDTH = 4.0  # updates, standard deviation of the smoothing weights
_DIVERGED = 4.0  # the test ends when the loss is this many times its minimum
_FEWEST = 10
_SIGNIFICANT = 3.0  # times the noise of the smoothed loss
_SAFETY = 10.0


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What the test found.

    Attributes:
        rates, losses, smooth: of each update up to where the loss diverges, and its smoothed course.
        steepest: rate at which the smoothed loss falls fastest per factor of the rate.
        suggestion: a tenth of the rate with the lowest smoothed loss, as a peak for the schedule.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    steepest: float
    suggestion: float


def _windows(
    task: Task, config: TrainConfig, device: torch.device
) -> Iterator[tuple[Round, loading.Batch, dict[str, float] | None]]:
    """Micro-batches with their factors in the order of training, epoch after epoch."""
    weighting = Weighting(task.counts, task.text_share, config.seed)
    epoch = 0
    while True:
        order = list(task.sampler.batches(epoch))
        todo = rounds(order, 0, config.data.accumulation, 1)
        shares = [shared.share(0) for shared in todo]
        loaded = loading.load_batches(task.train, task.collate, shares, device, config.data.workers)
        for shared, (indices, batch) in zip(todo, loaded, strict=True):
            yield shared, *weighting(epoch, shared, indices, batch)
        epoch += 1


def _smooth(losses: list[float]) -> npt.NDArray[np.float64]:
    """Mean of the neighbours with Gaussian weights: the loss of single batches is mostly noise."""
    place = np.arange(len(losses))
    weights = np.exp(-0.5 * ((place[:, None] - place[None, :]) / _WIDTH) ** 2)
    return np.asarray(weights @ np.asarray(losses) / weights.sum(axis=1))


def analyse(rates: list[float], losses: list[float]) -> RangeTest:
    """Cut `losses` where they diverge, smooth them, and read off the rates.

    Raises:
        UserError: too few points, or no fall of the loss beyond its noise.
    """
    count = next((n for n, loss in enumerate(losses) if not math.isfinite(loss) or _diverged(losses[:n], loss)), None)
    rates, losses = rates[:count], losses[:count]
    if len(losses) < _FEWEST:
        raise UserError(
            f"--find-lr: the loss diverged after {len(losses)} updates, expected at least {_FEWEST}", exit_code=1
        )
    smooth = _smooth(losses)
    lowest = int(smooth.argmin())
    top = int(smooth[: lowest + 1].argmax())
    # Of a mean with Gaussian weights: variance / (2 sqrt(pi) width).
    noise = float(np.std(np.asarray(losses) - smooth)) / math.sqrt(2 * math.sqrt(math.pi) * _WIDTH)
    fall = float(smooth[top] - smooth[lowest])
    if fall <= _SIGNIFICANT * noise:
        raise UserError(
            f"--find-lr: the loss fell by {fall:.3g} with a noise of {noise:.3g}, which shows nothing; "
            "take a larger --data.batch_size or --data.accumulation",
            exit_code=1,
        )
    slopes = np.gradient(smooth, np.log(rates))[top : lowest + 1]
    return RangeTest(rates, losses, smooth.tolist(), rates[top + int(slopes.argmin())], rates[lowest] / _SAFETY)


def _diverged(before: list[float], loss: float) -> bool:
    return len(before) > 0 and loss > _DIVERGED * min(before)


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
    rates: list[float] = []
    losses: list[float] = []
    ratio = (HIGHEST / LOWEST) ** (1 / (UPDATES - 1))
    for shared, batch, factors in _windows(task, config, device):
        updater.peak_rate = LOWEST * ratio ** len(rates)
        updater.add(shared, batch, factors)
        if not shared.closes:
            continue
        result = updater.finish()
        rates.append(result.rate)
        losses.append(math.nan if result.skipped else result.means["loss"])
        advance(len(rates), result.rate, losses[-1])
        if len(rates) == UPDATES or not math.isfinite(losses[-1]) or _diverged(losses[:-1], losses[-1]):
            break
    return analyse(rates, losses)


def publish(result: RangeTest, folder: Path) -> None:
    """Write lr_finder.json and lr_finder.png."""
    run_folder.write_json(folder / "lr_finder.json", dataclasses.asdict(result))
    figure = Figure(figsize=(6.4, 4.0))
    axis = figure.add_subplot()
    axis.plot(result.rates, result.losses, color="#8c959f", linewidth=0.7, label="each update")
    axis.plot(result.rates, result.smooth, color="#1f6feb", label="smoothed")
    axis.axvline(result.suggestion, color="#d1661a", linestyle="--", label=f"suggestion {result.suggestion:.1e}")
    axis.axvline(result.steepest, color="#8c959f", linestyle=":", label=f"steepest fall {result.steepest:.1e}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="total loss", title="Learning-rate range test")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "lr_finder.png", dpi=120)
