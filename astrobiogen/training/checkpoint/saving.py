"""What of a run goes into a checkpoint, and how a run is put back from one."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from astrobiogen.training import evaluation
from astrobiogen.training.batches.task import Task
from astrobiogen.training.checkpoint import chosen, packing, process_state
from astrobiogen.training.checkpoint.background import Background, HostCopy, Job
from astrobiogen.training.checkpoint.checks import MALFORMED
from astrobiogen.training.checkpoint.store import PROCESS, CheckpointStore, Content, Observer
from astrobiogen.training.config import resume_rules
from astrobiogen.training.config.as_dict import changed_on_resume, differences, refusal, to_dict
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError, NumericalError
from astrobiogen.training.evaluation import nonfinite
from astrobiogen.training.evaluation.progress import Progress
from astrobiogen.training.observe.watchdog import Watchdog
from astrobiogen.training.update import Updater

_LOG = logging.getLogger("astrobiogen")
# Seconds.
_WORTH_TELLING = 1.0
# What a run cannot go on without; see `CheckpointStore.load_newest`.
_NEEDED = {"model": (), "training": ("updater", "progress", "rng", "fingerprint", "config")}


class Saver:
    """Saves and restores the run that consists of `updater` (with its model), `progress` and every random generator.

    Args:
        run: checkpoints go to `checkpoints/` in its folder, the best model to `best/`.
        observer: passed on to the checkpoint stores (tests).
        watchdog: its section "save" limits a save; default: nothing does.

    Attributes:
        metrics: the last figures of "train" and "validation", which every checkpoint's manifest shows.

    With several processes, each of them must call each method.

    Raises:
        CheckpointError: the folders cannot be made.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        updater: Updater,
        progress: Progress,
        observer: Observer | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._watchdog = watchdog or Watchdog(None, {})
        self._world = run.world
        config, folder = run.config, run.folder
        asynchronous = config.checkpoint.asynchronous
        self._background = Background() if asynchronous else None
        self._copy = HostCopy() if asynchronous else None
        saving = self._world.twin() if asynchronous else self._world
        self.store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep, observer, saving)
        self.best_store = CheckpointStore(folder / "best", 1, observer, self._world)
        self._task = task
        self._config = config
        self._updater = updater
        self._model = updater.model
        self._progress = progress
        self._monitor = run.monitor
        self._saved_at = time.monotonic()
        self.metrics: dict[str, dict[str, float]] = {}

    def note(self, part: str, figures: Mapping[str, Any]) -> None:
        """Keep the finite numbers among the newest `figures` of training or validation for the next checkpoints."""
        numbers = {name: value for name, value in figures.items() if isinstance(value, float) and math.isfinite(value)}
        self.metrics = self.metrics | {part: numbers}

    def due(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed since the last save, whatever the epoch."""
        minutes = self._config.checkpoint.every_minutes
        return bool(minutes) and time.monotonic() - self._saved_at > minutes * 60

    def _state(self) -> dict[str, Any]:
        return {
            "updater": self._updater.state_dict(),
            "progress": dataclasses.asdict(self._progress),
            "rng": runtime.rng_state(),
            "fingerprint": self._task.fingerprint,
            "config": to_dict(self._config),
        }

    def _content(self) -> Content:
        tensors: dict[str, torch.Tensor] = {}
        updater = self._updater
        document = packing.pack(self._state(), tensors)
        files = {"model": dict(self._model.state_dict()), "training": tensors}
        if updater.average is not None:
            files["average"] = updater.average.averages
        if updater.window.batches and not updater.parallel.local_gradients:
            files["gradients"] = process_state.gradients(self._model)
        documents = {"training": document, "data": self._task.statistics}
        if self._world.distributed:
            name = f"{PROCESS}{self._world.rank}"
            files[name] = {}
            documents[name] = packing.pack(process_state.own_part(updater), files[name])
        return Content(files, documents, self.metrics)

    def save(self, why: str) -> bool:
        """Store a checkpoint; a full or read-only disk is reported and training goes on with the older ones kept. With
        `checkpoint.asynchronous` it is handed over, True then only means that, and `settle` tells how it went.

        Raises:
            NumericalError: the weights are not finite; stored, they would push out the whole ones.
        """
        self.settle()
        started = time.monotonic()
        self._saved_at = started
        self._require_finite()
        job = Job(self._progress.step, why, 0.0, started)
        with self._watchdog.section("save"):
            content = self._content()
            if self._background is not None and self._copy is not None:
                content = self._copy(content)
                job.stall = time.monotonic() - started
                self._background.start(job, lambda: self._write(job.step, content))
                return True
            try:
                job.result = self.store.save(job.step, content)
            except OSError as error:
                job.failure = error
        job.stall = job.seconds = time.monotonic() - started
        return self._report(job)

    def _write(self, step: int, content: Content) -> Path:
        with self._watchdog.section("save"):
            return self.store.save(step, content)

    def settle(self, wait: bool = True) -> bool:
        """Report the save that was handed over, once it is done; with `wait` it is waited for.

        Returns:
            False if it has failed.
        """
        if self._background is None:
            return True
        with self._watchdog.section("save"):
            started = time.monotonic()
            job = self._background.take(wait)
        if job is None:
            return True
        if (waited := time.monotonic() - started) > _WORTH_TELLING:
            _LOG.warning("waited %.1f s for the checkpoint of step %d, which was still being written", waited, job.step)
        job.stall += waited
        return self._report(job)

    def _report(self, job: Job) -> bool:
        if job.failure is not None and not isinstance(job.failure, OSError):
            raise job.failure
        if job.failure is not None:
            _LOG.error("checkpoint NOT saved (%s); the ones before it are untouched", job.failure)
            self._monitor.record("save_failed", step=job.step, error=str(job.failure))
            return False
        times = {"seconds": round(job.seconds, 3), "stall": round(job.stall, 3)}
        self._monitor.record("saved", step=job.step, checkpoint=job.result.name, why=job.why, **times)
        return True

    def save_best(self, result: evaluation.Evaluation) -> bool:
        """Store the model's present weights as the best ones so far, with what `result` says of them; False if the disk
        is full or read-only, which is reported.
        """
        step, epoch = self._progress.step, self._progress.epoch
        document = {"epoch": epoch, "validation": result.summary(), "config": to_dict(self._config)}
        documents = {"best": document, "data": self._task.statistics}
        content = Content({"model": dict(self._model.state_dict())}, documents, self.metrics)
        try:
            with self._watchdog.section("save"):
                self.best_store.save(step, content)
        except OSError as error:
            _LOG.error("best model NOT saved (%s); the one before it is untouched", error)
            self._monitor.record("save_failed", step=step, error=str(error))
            return False
        return True

    def _require_finite(self) -> None:
        """In every process, if in any."""
        found = self._world.gather(nonfinite.weights(self._model))
        if any(found):
            bad = next(text for text in found if text)
            raise NumericalError(
                f"the weights are not finite at step {self._progress.step}: {bad}; they were not saved, and the "
                "checkpoints before are untouched",
                weights=bad,
            )

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False if there is none, and the run starts at its beginning.

        Raises:
            CheckpointError: no checkpoint is whole, or it belongs to another model, other data or another
                configuration (`resume_rules`), or holds NaN.
        """
        references = process_state.References(self._updater)
        found = self.store.load_newest(references, _NEEDED, {"training": self._likeness()})
        if found is None:
            self._monitor.record("resumed", step=0, checkpoint="")
            _LOG.warning("no checkpoint in %s yet: the run starts at its beginning", self.store.root)
            return False
        path, content = found[0], references.placed(found[1])
        try:
            self._put_back(path, content)
        except MALFORMED as error:
            raise CheckpointError(f"{path} matches its checksums, but cannot be taken over: {error!r:.300}") from error
        self._monitor.record("resumed", step=self._progress.step, checkpoint=path.name)
        where = (path, self._progress.epoch + 1, self._progress.batch, self._task.sampler.batches_per_epoch)
        _LOG.info("resumed from %s: epoch %d, batch %d of %d", *where)
        return True

    def _put_back(self, path: Path, content: Content) -> None:
        state = packing.unpack(content.documents["training"], content.tensors["training"])
        self._require_same_run(path, state)
        self._world.together(lambda: self._require_sound(path, content))
        load_weights(self._model, path, content.tensors["model"])
        updater = self._updater
        updater.load_state_dict(state["updater"])
        if updater.average is not None:
            for name, value in content.tensors["average"].items():
                updater.average.averages[name].copy_(value)
        self._progress.load(state["progress"])
        process_state.put_back(updater, content, state["rng"], self._config.seed, self._progress.step)

    def _likeness(self) -> Any:
        """What training.json must hold, whatever its values; the configuration is compared by itself."""
        state = self._state() | {"config": {}}
        return packing.pack(state | {"rng": dict.fromkeys(set(state["rng"]) - {"cuda"})}, {})

    def _require_same_run(self, path: Path, state: Mapping[str, Any]) -> None:
        """Refuse other data and another course than those by which the checkpoint was made."""
        saved, wanted = state["config"], to_dict(self._config)
        if changed := changed_on_resume(saved, wanted):
            raise CheckpointError(f"{path} and config.yaml: {refusal(changed, 'the checkpoint')}")
        if state["fingerprint"] != self._task.fingerprint:
            raise CheckpointError(
                f"{path} was made with other data ({state['fingerprint']}) than the present ({self._task.fingerprint})"
            )
        for key, (before, after) in differences(saved, wanted).items():
            if resume_rules.group(key) is resume_rules.ROUNDING:
                words = (key, before, after, resume_rules.ROUNDING[key])
                _LOG.warning("%s was %r and is %r: the same training up to rounding (%s)", *words)

    def _require_sound(self, path: Path, content: Content) -> None:
        """Refuse a checkpoint that holds NaN, or Inf as a weight (a second moment may be Inf)."""
        require_finite(self._model, path, content.tensors["model"])
        require_finite(self._model, path, content.tensors.get("average", {}))
        moments = {name: value for name, value in content.tensors["training"].items() if ".optimizer." in name}
        require_finite(self._model, path, moments)

    def load_best(self) -> Path:
        """Put the weights of the best validation figure into the model.

        Raises:
            CheckpointError: there is no whole one.
        """
        references = process_state.References(self._updater)
        found = self.best_store.load_newest(references, {"model": ()})
        if found is None:
            raise CheckpointError(f"{self.best_store.root} holds no checkpoint")
        load_weights(self._model, found[0], references.placed(found[1]).tensors["model"])
        return found[0]

    def load_final(self) -> chosen.Chosen:
        """Put the weights that the closing examination is of into the model, see `chosen.choose`.

        Raises:
            CheckpointError: nothing whole was ever stored.
        """
        references = process_state.References(self._updater)
        found, content = chosen.choose(self.best_store, self.store, references)
        load_weights(self._model, found.path, chosen.averaged(references.placed(content)))
        return found


def load_weights(model: torch.nn.Module, path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Put `weights`, read from the checkpoint `path`, into `model`.

    Raises:
        CheckpointError: names or shapes do not fit, or a weight is not finite.
    """
    require_finite(model, path, weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another model: {' '.join(str(error).split())[:300]}") from error


def require_finite(model: torch.nn.Module, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse, of what was read from the checkpoint `path`, NaN anywhere and Inf in what is a parameter of `model`.

    Raises:
        CheckpointError: the tensors by name.
    """
    if bad := nonfinite.faulty(tensors, {name for name, _ in model.named_parameters()}):
        raise CheckpointError(f"{path} holds values that are not finite: {nonfinite.told(bad)}; take an older one")
