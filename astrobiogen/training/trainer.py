"""The training loop: epochs, validation, early stopping, saving and resuming."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from astrobiogen.training import evaluation, loading, metrics, packing, runtime
from astrobiogen.training.checkpoint import CheckpointStore, Content, Observer
from astrobiogen.training.config import TrainConfig, to_dict
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.monitor import Monitor
from astrobiogen.training.optimizer import build_optimizer
from astrobiogen.training.state import Progress, Task
from astrobiogen.training.update import Updater, UpdateResult, emphases

_LOG = logging.getLogger("astrobiogen")
_TIME_LIMIT = "time limit"


class Trainer:
    """Trains `task` in the run folder `folder`.

    Args:
        interrupt: its flag ends the run at the next micro-batch, after a save.
        observer: passed on to the checkpoint store (tests).

    Raises:
        UserError: the folder cannot be used, an optional library is missing.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        folder: Path,
        monitor: Monitor,
        interrupt: runtime.Interrupt,
        *,
        device: torch.device,
        dtype: torch.dtype,
        observer: Observer | None = None,
    ) -> None:
        self.task = task
        self.config = config
        self.progress = Progress()
        self.store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep, observer)
        self.best_store = CheckpointStore(folder / "best", 1, observer)
        self._monitor = monitor
        self._interrupt = interrupt
        self._device = device
        self._dtype = dtype
        self._batches = task.sampler.batches_per_epoch
        updates = math.ceil(self._batches / config.data.accumulation)
        self.model = task.model.to(device)
        self.updater = Updater(
            self.model,
            task.loss_function,
            build_optimizer(self.model, config.optimizer),
            config,
            updates * config.epochs,
            device,
            dtype,
        )
        self._saved_at = time.monotonic()

    # ---- saving and resuming
    # ------------------------------------------------------------------------------------------------------

    def _content(self) -> Content:
        tensors: dict[str, torch.Tensor] = {}
        state = {
            "updater": self.updater.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            "rng": runtime.rng_state(),
            "fingerprint": self.task.fingerprint,
            "config": to_dict(self.config),
        }
        document = packing.pack(state, tensors)
        files = {"model": dict(self.model.state_dict()), "training": tensors}
        if self.updater.average is not None:
            files["average"] = self.updater.average.averages
        if self.updater.window.batches:
            files["gradients"] = {
                name: value.grad for name, value in self.model.named_parameters() if value.grad is not None
            }
        return Content(files, {"training": document})

    def save(self, why: str) -> bool:
        """Store a checkpoint; a full or read-only disk is reported and training goes on with the older ones kept."""
        started = time.monotonic()
        self._saved_at = started
        try:
            path = self.store.save(self.progress.step, self._content())
        except OSError as error:
            _LOG.error("checkpoint NOT saved (%s); the ones before it are untouched", error)
            self._monitor.record("save_failed", step=self.progress.step, error=str(error))
            return False
        seconds = round(time.monotonic() - started, 3)
        self._monitor.record("saved", step=self.progress.step, checkpoint=path.name, why=why, seconds=seconds)
        return True

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False if there is none, and the run starts at its beginning.

        Raises:
            CheckpointError: no checkpoint is whole, or it belongs to another model or other data.
        """
        found = self.store.load_newest()
        if found is None:
            self._monitor.record("resumed", step=0, checkpoint="")
            _LOG.warning("no checkpoint in %s yet: the run starts at its beginning", self.store.root)
            return False
        path, content = found
        state = packing.unpack(content.documents["training"], content.tensors["training"])
        if state["fingerprint"] != self.task.fingerprint:
            raise CheckpointError(
                f"{path} was made with other data ({state['fingerprint']}) than the present ({self.task.fingerprint})"
            )
        self._load_weights(path, content.tensors["model"])
        self.updater.load_state_dict(state["updater"])
        if self.updater.average is not None:
            for name, value in content.tensors["average"].items():
                self.updater.average.averages[name].copy_(value)
        for name, parameter in self.model.named_parameters():
            gradient = content.tensors.get("gradients", {}).get(name)
            parameter.grad = None if gradient is None else gradient.to(self._device, copy=True)
        self.progress = Progress(**state["progress"])
        runtime.set_rng_state(state["rng"])
        self._monitor.record("resumed", step=self.progress.step, checkpoint=path.name)
        _LOG.info(
            "resumed from %s: epoch %d, batch %d of %d",
            path,
            self.progress.epoch + 1,
            self.progress.batch,
            self._batches,
        )
        return True

    def _load_weights(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{path} belongs to another model: {first}") from error

    def load_best(self) -> Path:
        """Put the weights of the best validation figure into the model.

        Raises:
            CheckpointError: there is no whole one.
        """
        found = self.best_store.load_newest()
        if found is None:
            raise CheckpointError(f"{self.best_store.root} holds no checkpoint")
        self._load_weights(found[0], found[1].tensors["model"])
        return found[0]

    # ---- the loop
    # -----------------------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train until an end is reached; False if a signal stopped it (a checkpoint has then been saved, if the disk
        allowed it).
        """
        self._monitor.begin_progress(self._batches * self.config.epochs, self.progress.step)
        try:
            return self._fit()
        finally:
            self._monitor.end_progress()

    def _fit(self) -> bool:
        progress = self.progress
        while not progress.stopped or progress.validating:
            if not progress.validating and not self._train_epoch():
                return False
            if not self._validate():
                return False
            every = self.config.checkpoint.every_epochs
            if not progress.stopped.startswith(_TIME_LIMIT) and (
                progress.stopped or (every and progress.epoch % every == 0)
            ):
                self.save(progress.stopped or "epoch")
        _LOG.info("training ended: %s", progress.stopped)
        return True

    def _train_epoch(self) -> bool:
        """The rest of the current epoch; False if interrupted."""
        progress, config = self.progress, self.config
        self.model.train()
        whole = list(self.task.sampler.batches(progress.epoch))
        order = whole[progress.batch :]
        for indices, batch in loading.load_batches(
            self.task.train, self.task.collate, order, self._device, config.data.workers
        ):
            started = time.monotonic()
            self.updater.add(indices, batch, self._emphasis(whole))
            progress.batch += 1
            progress.step += 1
            full = progress.batch % config.data.accumulation == 0 or progress.batch == self._batches
            if full:
                self._log_update(self.updater.finish(), time.monotonic() - started)
            progress.seconds += time.monotonic() - started
            if self._interrupted():
                return False
            if progress.seconds > config.stop.max_hours * 3600:
                # Saved before the end is written down, so that the run can be resumed from here with a higher limit.
                self.save("time limit")
                limit = f"{_TIME_LIMIT} (stop.max_hours {config.stop.max_hours:g})"
                progress.stopped = f"{limit} in epoch {progress.epoch + 1} of {config.epochs}"
                break
            if (
                config.checkpoint.every_minutes
                and time.monotonic() - self._saved_at > config.checkpoint.every_minutes * 60
            ):
                self.save("time")
        progress.validating = True
        return True

    def _emphasis(self, order: list[list[int]]) -> dict[str, float] | None:
        """Factors of the loss's terms for the coming micro-batch, so that its window equals the full batch."""
        size, counts = self.config.data.accumulation, self.task.counts
        if counts is None or size == 1:
            return None
        first = self.progress.batch // size * size
        window = order[first : first + size]
        return emphases([counts(indices) for indices in window], [len(indices) for indices in window])[
            self.progress.batch - first
        ]

    def _interrupted(self) -> bool:
        if not self._interrupt.received:
            return False
        saved = self.save(self._interrupt.received)
        self._monitor.record("interrupted", step=self.progress.step, signal=self._interrupt.received, saved=saved)
        return True

    def _log_update(self, result: UpdateResult, seconds: float) -> None:
        progress, updater = self.progress, self.updater
        if not result.skipped:
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
            seconds=round(seconds, 4),
        )
        text = f"epoch {progress.epoch + 1}/{self.config.epochs}  loss {result.means['loss']:.4f}"
        self._monitor.advance(progress.step, text)
        if result.skipped:
            _LOG.warning(
                "update skipped: gradient norm %s; samples %s", result.norm, updater.bad_windows[-1]["batches"]
            )
        if not self._monitor.rich and updater.updates % self.config.monitor.log_every == 0:
            _LOG.info("%s  step %d  lr %.2e  norm %.2f", text, progress.step, result.rate, result.norm)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model, if there are any; the raw ones again afterwards."""
        average = self.updater.average
        if average is None:
            yield
            return
        raw = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(average.averages)
        try:
            yield
        finally:
            self.model.load_state_dict(raw)

    def _validate(self) -> bool:
        """Validate, keep the best, advance to the next epoch; False if interrupted (it is then repeated on
        resuming).
        """
        started = time.monotonic()
        with self._averaged():
            result = evaluation.evaluate(
                self.model,
                self.task.loss_function,
                self.task.validation,
                self.task.collate,
                batch_size=self.config.evaluation.batch_size,
                device=self._device,
                dtype=self._dtype,
                order=self.task.validation_order,
                should_stop=lambda: bool(self._interrupt.received),
            )
            better = result is not None and self._judge(result)
            if result is not None and better:
                self._save_best(result)
        if result is None:  # outside the block above: the checkpoint must hold the raw weights
            self._interrupted()
            return False
        self._finish_epoch(result, better, time.monotonic() - started)
        return True

    def _judge(self, result: evaluation.Evaluation) -> bool:
        progress, metric = self.progress, self.config.stop.metric
        value = result.figure(metric)
        sign = -1.0 if metric in ("loss", "class_loss") else 1.0
        better = math.isfinite(value) and (progress.best is None or sign * value > sign * progress.best)
        if better:
            progress.best, progress.best_epoch, progress.bad_epochs = value, progress.epoch, 0
        else:
            progress.bad_epochs += 1
        return better

    def _save_best(self, result: evaluation.Evaluation) -> None:
        document = {"epoch": self.progress.epoch, "validation": result.summary(), "config": to_dict(self.config)}
        try:
            self.best_store.save(
                self.progress.step, Content({"model": dict(self.model.state_dict())}, {"best": document})
            )
        except OSError as error:
            _LOG.error("best model NOT saved (%s); the one before it is untouched", error)
            self._monitor.record("save_failed", step=self.progress.step, error=str(error))

    def _finish_epoch(self, result: evaluation.Evaluation, better: bool, seconds: float) -> None:
        progress, stop = self.progress, self.config.stop
        train = {name: value / max(progress.epoch_samples, 1) for name, value in progress.epoch_sums.items()}
        summary = result.summary()
        self._monitor.record(
            "epoch",
            step=progress.step,
            epoch=progress.epoch,
            train=train,
            validation=summary,
            best=better,
            seconds=round(seconds, 3),
        )
        _LOG.info(
            "epoch %d/%d  train loss %.4f  validation: loss %.4f  cross-entropy %.4f  accuracy %.3f  AUROC %.3f%s",
            *(
                progress.epoch + 1,
                self.config.epochs,
                train.get("loss", math.nan),
                summary["loss"],
                summary["class_loss"],
            ),
            *(summary["accuracy"], summary["auroc"], "  (best)" if better else ""),
        )
        progress.validating, progress.batch, progress.epoch_samples, progress.epoch_sums = False, 0, 0, {}
        progress.epoch += 1
        if progress.stopped:
            return
        if progress.epoch >= self.config.epochs:
            progress.stopped = "all epochs done"
        elif stop.patience and progress.bad_epochs >= stop.patience:
            progress.stopped = f"early: no better {stop.metric} for {stop.patience} epochs"
        elif (
            stop.target_accuracy < 1
            and metrics.accuracy_lower_bound(result.predictions, self.config.seed) >= stop.target_accuracy
        ):
            progress.stopped = f"target: validation accuracy is at least {stop.target_accuracy:g} with 95 % confidence"
