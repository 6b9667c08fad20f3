"""One optimizer update from a window of micro-batches."""

import dataclasses
import math
from typing import Any

import torch

from astrobiogen.models import CountsUpdates
from astrobiogen.training.batches import loading
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed.model import Parallel, total_norm
from astrobiogen.training.distributed.share import Round
from astrobiogen.training.errors import NumericalError
from astrobiogen.training.optim import precision, schedule
from astrobiogen.training.optim.optimizer import WeightAverage, settle, step_unless

# Skipped windows that the report of a numerical stop lists.
_REPORTED = 5
# Share of the updates taken that may be skipped beside `precision.skip_budget`: one bad sample in a run of weeks is not
# what the budget is for.
_TOLERATED = 0.01


@dataclasses.dataclass
class Window:
    """The open accumulation window.

    Attributes:
        batches: micro-batches in it so far, of all processes.
        samples: samples in it so far, of all processes.
        names: "loss" and its terms.
        sums: each of `names` summed over this process's samples, then their text tokens; fp64, on the model's device:
            reading it waits for the device, so that is done once per window.
        ids: sample numbers of each micro-batch, for the report if it turns out not to be finite.
    """

    batches: int = 0
    samples: int = 0
    names: list[str] = dataclasses.field(default_factory=list)
    sums: torch.Tensor | None = None
    ids: list[list[int]] = dataclasses.field(default_factory=list)

    def add(self, shared: Round, own: int, values: dict[str, torch.Tensor], tokens: torch.Tensor | None) -> None:
        """Take in a round: `values` are means over the `own` samples of this process, which have `tokens` tokens."""
        self.batches += shared.batches
        self.samples += shared.samples
        self.ids.append([index for part in shared.parts for index in part])
        self.names = list(values)
        means = [value.detach().double().reshape(()) for value in values.values()]
        count = torch.zeros_like(means[0]) if tokens is None else tokens.double()
        summed = torch.stack([*(mean * own for mean in means), count])
        self.sums = summed if self.sums is None else self.sums + summed


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """What one update did: means over the window's samples, how many these were, their text tokens, the gradient norm
    before clipping, the rate, and whether it was skipped."""

    means: dict[str, float]
    samples: int
    tokens: int
    norm: float
    rate: float
    skipped: bool


def _read(norm: torch.Tensor, bad: torch.Tensor, sums: torch.Tensor | None) -> list[float]:
    """All on the host in one transfer."""
    if sums is None:
        raise ValueError("finish: the window has no micro-batch")
    values: list[float] = torch.cat([norm.double().reshape(1), bad.double().reshape(1), sums.to(norm.device)]).tolist()
    return values


class Updater:
    """Turns micro-batches into updates.

    The gradient of a window with micro-batches b of n_b samples and mean losses L_b is that of `sum_b n_b L_b / sum_b
    n_b`, which is the mean over all samples of the window, whatever the sizes; also for a short last window.
    Micro-batch gradients are summed in fp32 with the weight n_b / nominal (nominal = batch_size x accumulation) and
    rescaled once by nominal / sum_b n_b, which is exactly 1 for a full window. With several processes the window is
    that of all of them together; each weighs its share by their number, since the exchange averages.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        total_updates: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.parallel = parallel
        self.model = model = parallel.model
        self.optimizer = optimizer
        self.scaler = precision.LossScaler(config.precision, dtype)
        self.average = WeightAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
        self.window = Window()
        self.updates = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.charged = 0
        self.bad_windows: list[dict[str, Any]] = []
        self.total_updates = total_updates
        self.peak_rate = config.optimizer.learning_rate
        self._counting = [module for module in model.modules() if isinstance(module, CountsUpdates)]
        self._config = config
        self._device = device
        self._dtype = dtype
        self._nominal = config.data.batch_size * config.data.accumulation

    def add(self, shared: Round, batch: loading.Batch, emphasis: dict[str, float] | None = None) -> None:
        """Forward and backward of this process's share of a round; its weighted gradient is added to the window's.

        Args:
            batch: the samples `shared.share(rank)`.
            emphasis: factors of the loss's terms, see `weighting.emphasis`.
        """
        world = self.parallel.world
        own = len(shared.parts[world.rank])
        with self.parallel.accumulating(shared.closes):
            with precision.autocast(self._device, self._dtype):
                loss, parts = self.parallel.objective(batch, emphasis)
            (loss.float() * (own * world.size / self._nominal * self.scaler.scale)).backward()
        mask = batch.get("attention_mask")
        if mask is not None and batch.get("text_rows") is not None:
            mask = mask[batch["text_rows"]]
        self.window.add(shared, own, {"loss": loss, **parts}, None if mask is None else mask.sum())

    def finish(self) -> UpdateResult:
        """Close the window: rescale, check, clip, step, average.

        The norm decides on the device whether the step is taken. The host waits for it once, afterwards, to tell.

        Raises:
            NumericalError: more than `precision.skip_budget` updates were not finite, in a row or (those that lowering
                the loss scale does not mend) over the run.
        """
        window, config = self.window, self._config
        rate = schedule.apply(config.schedule, self.optimizer, self.peak_rate, self.updates, self.total_updates)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        factor = self._nominal / window.samples / self.scaler.scale
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        total = total_norm(gradients)
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip_norm, total)
        bad = self.parallel.anywhere((~torch.isfinite(total)).float())
        step_unless(bad, self.optimizer)
        norm, flag, *sums = _read(total, bad, window.sums)
        *sums, tokens = self.parallel.world.sum(sums)
        means = {name: value / window.samples for name, value in zip(window.names, sums, strict=True)}
        skipped = flag > 0
        settle(self.optimizer, skipped)
        if skipped:
            self._skip(means, norm)
        else:
            self.updates += 1
            self.skipped_in_row = 0
            for module in self._counting:
                module.after_update()
            if self.average is not None:
                self.average.update(self.model)
        self.scaler.update(overflow=skipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.window = Window()
        budget = config.precision.skip_budget
        if skipped and (self.skipped_in_row > budget or self.charged > budget + _TOLERATED * self.updates):
            raise NumericalError(self._report(), self.bad_windows)
        return UpdateResult(means, window.samples, int(tokens), norm, rate, skipped)

    def _skip(self, means: dict[str, float], norm: float) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        self.charged += not (self.scaler.can_fall and all(math.isfinite(value) for value in means.values()))
        bad = {
            "batches": self.window.ids,
            "gradient_norm": str(norm),
            "means": {name: str(value) for name, value in means.items()},
        }
        self.bad_windows = [*self.bad_windows, bad][-_REPORTED:]

    def require_one(self) -> None:
        """Called at the end of training, whose figures would be those of the random start if nothing was learnt.

        Raises:
            NumericalError: every update was skipped.
        """
        if self.skipped and not self.updates:
            raise NumericalError(self._report(), self.bad_windows)

    def _report(self) -> str:
        last = self.bad_windows[-1]
        wrong = [name for name, value in last["means"].items() if not math.isfinite(float(value))]
        budget = self._config.precision.skip_budget
        count = f"{self.charged} updates of the run"
        if self.skipped_in_row > budget:
            count = f"{self.skipped_in_row} updates in a row"
        elif not self.updates:
            count = f"all {self.skipped} updates"
        return (
            f"{count} had NaN or Inf gradients (precision.skip_budget {budget}; {self.updates} taken); "
            f"terms not finite in the last: {', '.join(wrong) or 'none, only their gradients'}; "
            f"samples of the last: {last['batches']}; "
            "the last checkpoint holds the weights from before"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and gradients, packable."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average_updates": self.average.updates if self.average else 0,
            "window": dict(vars(self.window)),
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "charged": self.charged,
            "bad_windows": self.bad_windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["average_updates"]
        self.window = Window(**state["window"])
        if self.window.sums is not None:
            self.window.sums = self.window.sums.to(self._device)
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.skipped_in_row, self.charged = state["skipped_in_row"], state["charged"]
        self.bad_windows = state["bad_windows"]
