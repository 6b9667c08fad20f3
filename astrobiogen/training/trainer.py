"""The training loop: epochs, windows, validation, and the places where it may stop."""

import contextlib
import datetime
import functools
import logging
import math
import time

from astrobiogen.training import evaluation
from astrobiogen.training.batches import loading
from astrobiogen.training.batches.task import Task
from astrobiogen.training.batches.weighting import Weighting
from astrobiogen.training.checkpoint import Observer, process_state
from astrobiogen.training.checkpoint.saving import Saver
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import runtime
from astrobiogen.training.distributed.model import Parallel
from astrobiogen.training.distributed.share import rounds
from astrobiogen.training.errors import NumericalError
from astrobiogen.training.evaluation import metrics, nonfinite, stopping
from astrobiogen.training.evaluation.progress import Progress
from astrobiogen.training.observe.watchdog import Watchdog
from astrobiogen.training.optim import precision
from astrobiogen.training.optim.optimizer import build_optimizer
from astrobiogen.training.tools.memory import MemoryProbe
from astrobiogen.training.tools.rerun import Rerun
from astrobiogen.training.tools.throughput import Throughput
from astrobiogen.training.update import Updater, UpdateResult

_LOG = logging.getLogger("astrobiogen")
# Of the bootstrap after each epoch; the closing examination takes as many as `evaluation.bootstrap` says.
_REPLICATES = 200
_UNITS = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s", "mfu": "MFU"}


class Trainer:
    """Trains `task` as `run` says.

    Args:
        interrupt: its flag, in any process, ends the run at the next micro-batch, after a save.
        throughput: turns seconds into the rates of the log.
        watchdog: ends the process if a section of the run hangs; default: nothing does.
        observer: passed on to the checkpoint stores (tests).

    Raises:
        UserError: the folder cannot be used, an optional library is missing.
    """

    def __init__(
        self,
        task: Task,
        run: Run,
        interrupt: runtime.Interrupt,
        *,
        throughput: Throughput | None = None,
        observer: Observer | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        config, world = run.config, run.world
        self.task = task
        self.run = run
        self.config = config
        self.progress = Progress()
        self._monitor = run.monitor
        self._interrupt = interrupt
        self._world = world
        self._watchdog = watchdog or Watchdog(None, {})
        self._throughput = throughput or Throughput()
        self._clock = self._window_clock = time.monotonic()
        self._batches = task.sampler.batches_per_epoch
        updates = math.ceil(self._batches / config.data.accumulation) * config.epochs
        # FSDP2 moves each block itself, once it is sharded: the whole model need not fit on the device.
        sharded = world.distributed and config.distributed.strategy == "fsdp2"
        self.model = task.model if sharded else task.model.to(run.device)
        places = (world, config.distributed, run.device, run.dtype)
        parallel = Parallel(self.model, task.loss_function, *places, task.every_parameter)
        optimizer = build_optimizer(self.model, config.optimizer)
        process_state.seed_process(config.seed, world)
        self.updater = Updater(parallel, optimizer, config, updates, run.device, run.dtype)
        self._rerun = Rerun(run, self.updater)
        self._weighting = Weighting(task.counts, task.text_share, config.seed)
        self._probe = MemoryProbe(run, self.updater, task.loss_function)
        self.saver = Saver(run, task, self.updater, self.progress, observer, self._watchdog)

    def fit(self) -> bool:
        """Train until an end is reached; False if a signal stopped it (a checkpoint has then been saved, if the disk
        allowed it).
        """
        self._clock = self._window_clock = time.monotonic()
        self._monitor.begin_progress(self._batches * self.config.epochs, self.progress.step)
        try:
            return self._fit()
        finally:
            self.saver.settle()
            self._monitor.end_progress()

    def _fit(self) -> bool:
        progress = self.progress
        while not progress.stopped or progress.validating:
            if not progress.validating and not self._train_epoch():
                return False
            if not self._validate():
                return False
            every = self.config.checkpoint.every_epochs
            if not progress.stopped.startswith(stopping.TIME_LIMIT) and (
                progress.stopped or (every and progress.epoch % every == 0)
            ):
                self.saver.save(progress.stopped or "epoch")
        self.updater.require_one()
        _LOG.info("training ended: %s", progress.stopped)
        return True

    def origin(self, error: NumericalError) -> str:
        """Where the NaN or Inf in the last of the skipped updates of `error` comes from, in one line."""
        indices = [index for part in error.windows[-1]["batches"] for index in part] if error.windows else []
        autocast = functools.partial(precision.autocast, self.run.device, self.run.dtype)
        alone = None if self._world.distributed else autocast
        return nonfinite.origin(self.model, self.task.train, self.task.collate, indices, alone)

    def _train_epoch(self) -> bool:
        """The rest of the current epoch; False if interrupted."""
        progress, world = self.progress, self._world
        self.model.train()
        order = list(self.task.sampler.batches(progress.epoch))
        todo = rounds(order, progress.batch, self.config.data.accumulation, world.size)
        shares = [shared.share(world.rank) for shared in todo]
        loaded = loading.load_batches(
            self.task.train, self.task.collate, shares, self.run.device, self.config.data.workers
        )
        for shared, (indices, batch) in zip(todo, self._watchdog.each("data", loaded), strict=True):
            if self.task.augment is not None:
                batch = self.task.augment(batch)
            batch, factors = self._weighting(progress.epoch, shared, indices, batch)
            watching = self._probe.watching(batch) if self._probe.due(shared.closes) else contextlib.nullcontext()
            with self._watchdog.section("step"), watching:
                self._rerun.keep(shared, batch, factors)
                self.updater.add(shared, batch, factors)
                progress.batch += shared.batches
                progress.step += shared.batches
                if shared.closes:
                    self._rerun.examine(progress.step)
                    self._log_update(self.updater.finish())
            self._tick()
            self.saver.settle(wait=False)
            if not self.updater.parallel.may_stop(shared.closes):
                continue
            # The clock is that of process 0; a signal counts in whichever process it arrives.
            interrupted, ended, due = world.maximum(
                [
                    bool(self._interrupt.received),
                    world.main and stopping.time_limit(progress, self.config),
                    world.main and self.saver.due(),
                ]
            )
            if interrupted:
                self._save_interrupted()
                return False
            if ended:
                # Saved before the end is written down, so that the run can be resumed from here with a higher limit.
                self.saver.save(stopping.TIME_LIMIT)
                progress.stopped = stopping.describe_limit(progress, self.config)
                break
            if due:
                self.saver.save("time")
        progress.validating = True
        return True

    def _tick(self) -> float:
        """Count the wall-clock time since the last call as time of the run; returns the present time."""
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now
        return now

    def _save_interrupted(self) -> None:
        """Save, after a signal in some process."""
        self._interrupt.received = next(name for name in self._world.gather(self._interrupt.received) if name)
        saved = self._interrupt.saved = self.saver.save(self._interrupt.received) and self.saver.settle()
        self._monitor.record("interrupted", step=self.progress.step, signal=self._interrupt.received, saved=saved)

    def _log_update(self, result: UpdateResult) -> None:
        progress, updater = self.progress, self.updater
        now = self._tick()
        speed = self._throughput.rates(now - self._window_clock, result.samples, result.tokens)
        self._window_clock = now
        if not result.skipped:
            self.saver.note("train", result.means)
            progress.epoch_samples += result.samples
            for name, value in result.means.items():
                progress.epoch_sums[name] = progress.epoch_sums.get(name, 0.0) + value * result.samples
        self._monitor.record(
            "step",
            step=progress.step,
            epoch=progress.epoch,
            update=updater.updates,
            loss=result.means["loss"],
            parts={name: value for name, value in result.means.items() if name != "loss"},
            learning_rate=result.rate,
            gradient_norm=result.norm,
            skipped=result.skipped,
            loss_scale=updater.scaler.scale,
            speed=speed,
        )
        text = f"epoch {progress.epoch + 1}/{self.config.epochs}  loss {result.means['loss']:.4f}"
        self._monitor.advance(progress.step, text)
        if result.skipped:
            bad = updater.bad_windows[-1]
            _LOG.warning("update skipped: gradient norm %s; samples %s", result.norm, bad["batches"])
        if not self._monitor.rich and updater.updates % self.config.monitor.log_every == 0:
            rates = "  ".join(f"{speed[name]:.3g} {unit}" for name, unit in _UNITS.items() if name in speed)
            left = datetime.timedelta(seconds=round(self._seconds_left()))
            words = (text, progress.step, result.rate, result.norm, rates, left)
            _LOG.info("%s  step %d  lr %.2e  norm %.2f  %s  at most %s left", *words)

    def _seconds_left(self) -> float:
        """Until the last epoch ends at the speed so far, or until the time limit if that comes first."""
        progress, config = self.progress, self.config
        todo = self._batches * config.epochs - progress.step
        allowed = max(config.stop.max_hours * 3600 - progress.seconds, 0.0)
        return min(progress.seconds / progress.step * todo, allowed)

    def _validate(self) -> bool:
        """Validate, keep the best, advance to the next epoch; False if interrupted (it is then repeated on
        resuming).
        """
        started = time.monotonic()
        average = self.updater.average
        watched = self._watchdog.section("validation")

        def should_stop() -> bool:  # asked before each batch: so it gets on
            section.beat()
            return bool(self._interrupt.received)

        with watched as section, average.applied(self.model) if average else contextlib.nullcontext():
            result = evaluation.evaluate(
                self.model,
                self.task.loss_function,
                self.task.validation,
                self.task.collate,
                batch_size=self.config.evaluation.batch_size,
                device=self.run.device,
                dtype=self.run.dtype,
                order=self.task.validation_order,
                counts=self.task.validation_counts,
                should_stop=should_stop,
                world=self._world,
                what=f"validation after epoch {self.progress.epoch + 1}",
            )
            if result is not None:
                self.saver.note("validation", result.summary())
            better = result is not None and stopping.judge(self.progress, self.config.stop, result)
            # The state moves only once the model is stored: what is called the best is what can be loaded.
            stored = result is not None and better and self.saver.save_best(result)
        if result is None:  # outside the block above: the checkpoint must hold the raw weights
            self._save_interrupted()
            return False
        self._window_clock = self._tick()
        stopping.enter(self.progress, self.config.stop, result, stored)
        remark = "  (best)" if stored else "  (best, but NOT saved)" if better else ""
        self._finish_epoch(result, stored, self._window_clock - started, remark)
        return True

    def _finish_epoch(self, result: evaluation.Evaluation, stored: bool, seconds: float, remark: str) -> None:
        progress = self.progress
        train = {name: value / max(progress.epoch_samples, 1) for name, value in progress.epoch_sums.items()}
        replicates = min(self.config.evaluation.bootstrap, _REPLICATES)
        intervals = metrics.with_intervals(result.predictions, replicates, self.config.seed)
        summary = result.summary() | {"intervals": {name: item.as_dict() for name, item in intervals.items()}}
        self._monitor.record(
            "epoch",
            step=progress.step,
            epoch=progress.epoch,
            train=train,
            validation=summary,
            best=stored,
            seconds=round(seconds, 3),
        )
        _LOG.info(
            "epoch %d/%d  train loss %.4f  validation: loss %.4f  cross-entropy %.4f  accuracy %s  AUROC %s  ECE %s%s",
            *(progress.epoch + 1, self.config.epochs, train.get("loss", math.nan)),
            *(summary["loss"], summary["class_loss"], *(str(intervals[name]) for name in ("accuracy", "auroc", "ece"))),
            remark,
        )
        progress.begin_epoch()
        progress.stopped = progress.stopped or stopping.reason(progress, self.config, result.predictions)
