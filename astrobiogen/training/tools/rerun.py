"""Telling faults of the data or the model from faults of the hardware: an update that looks wrong is computed again.

The micro-batches of the open update are kept, each with the state of the random generators before it. If the loss or
the gradient is not finite, or the loss is a spike, they are run once more from the same state, before the update is
taken. The same bits mean that the data or the model are to blame. Other bits mean that something was computed wrongly
once: memory, a GPU, a processor. Training goes on with the second result, which the budget for bad updates then judges.

Costs a wait for the device per update and the memory of an update's micro-batches; holds where the same operations give
the same bits (`runtime.deterministic`, the default).
"""

import collections
import dataclasses
import logging
import math
import statistics
from typing import Any

import torch

from astrobiogen.training.batches import loading
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import local_part, runtime
from astrobiogen.training.distributed.model import total_norm
from astrobiogen.training.distributed.share import Round
from astrobiogen.training.update import Updater, Window

_LOG = logging.getLogger("astrobiogen")


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A micro-batch as it was run."""

    shared: Round
    batch: loading.Batch
    factors: dict[str, float] | None
    generators: dict[str, Any]


class Rerun:
    """Watches over the updates of `updater`; does nothing unless `spike.rerun` is on."""

    def __init__(self, run: Run, updater: Updater) -> None:
        self._updater, self._monitor = updater, run.monitor
        config = run.config
        self._on = config.spike.rerun
        self._factor, self._window = config.spike.factor, config.spike.window
        self._deterministic = config.runtime.deterministic
        self._losses: collections.deque[float] = collections.deque(maxlen=self._window)
        self._kept: list[_Kept] = []
        self._buffers: list[torch.Tensor] = []

    def keep(self, shared: Round, batch: loading.Batch, factors: dict[str, float] | None) -> None:
        """Note a micro-batch that will be run next."""
        if not self._on:
            return
        if not self._updater.window.batches:
            self._kept = []
            self._buffers = [buffer.detach().clone() for buffer in self._updater.model.buffers()]
        elif not self._kept:
            return  # the update began before the run was resumed: its first micro-batches are not known
        self._kept.append(_Kept(shared, batch, factors, runtime.rng_state()))

    def examine(self, step: int) -> None:
        """Look at the update that is about to be taken, and compute it again if it looks wrong."""
        if not self._on or not self._kept:
            return
        loss = self._loss()
        wrong = self._wrong(loss)
        if not wrong:
            self._losses.append(loss)
        else:
            self._again(step, loss, wrong)
        self._kept, self._buffers = [], []

    def _loss(self) -> float:
        window = self._updater.window
        assert window.sums is not None
        total: float = self._updater.parallel.world.sum([float(window.sums[0])])[0]
        return total / window.samples

    def _wrong(self, loss: float) -> str:
        """What looks wrong, the same in every process; empty if nothing does."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if self._updater.scaler.scale == 1.0:  # with a loss scale overflows are part of the method
            norm = float(total_norm(list(self._gradients())))
            if self._updater.parallel.world.any(not math.isfinite(norm)):
                return f"gradient norm {norm}"
        if len(self._losses) == self._window:
            median = statistics.median(self._losses)
            if loss > self._factor * median > 0:
                return f"loss {loss:.4g}, {loss / median:.2g} times the median of the last {self._window}"
        return ""

    def _gradients(self) -> Any:
        return (one.grad for one in self._updater.model.parameters() if one.grad is not None)

    def _state(self) -> list[torch.Tensor]:
        """What the update is made of in this process, as bytes: NaN then equals itself."""
        sums = self._updater.window.sums
        assert sums is not None
        found = [sums, *(local_part(one) for one in self._gradients())]
        return [one.detach().clone().contiguous().reshape(-1).view(torch.uint8) for one in found]

    def _again(self, step: int, loss: float, wrong: str) -> None:
        updater, world = self._updater, self._updater.parallel.world
        first, after = self._state(), runtime.rng_state()
        updater.optimizer.zero_grad(set_to_none=True)
        updater.window = Window()
        with torch.no_grad():
            for buffer, value in zip(updater.model.buffers(), self._buffers, strict=True):
                buffer.copy_(value)
        for kept in self._kept:
            runtime.set_rng_state(kept.generators)
            updater.add(kept.shared, kept.batch, kept.factors)
        runtime.set_rng_state(after)
        second = self._state()
        same = len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))
        answers = world.gather((torch.equal(first[0], second[0]), same))
        # Gradients are averaged, so that a fault shows in those of all; sums of losses are each process's own.
        differing = [rank for rank, (sums, _) in enumerate(answers) if not sums]
        differing = differing or [rank for rank, (_, all_) in enumerate(answers) if not all_]
        verdict = "not reproducible: hardware" if differing else "reproducible: data or model"
        if differing and not self._deterministic:
            verdict = "not reproducible: hardware, or operations that are not deterministic (runtime.deterministic)"
        place = f" in process {', '.join(map(str, differing))} of {world.size}" if differing else ""
        again = self._loss()
        words = (step, wrong, again, verdict, place)
        level = logging.ERROR if differing else logging.WARNING
        _LOG.log(level, "update at step %d looks wrong (%s); computed again: loss %.4g; %s%s", *words)
        samples = [list(part) for kept in self._kept for part in kept.shared.parts]
        self._monitor.record(
            "rerun", step=step, why=wrong, loss=loss, again=again, verdict=verdict, processes=differing, samples=samples
        )
