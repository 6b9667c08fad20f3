"""A whole run: prepare, train, examine the best model, report."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

import astrobiogen
from astrobiogen.data import DatasetBundle
from astrobiogen.training.batches import assemble
from astrobiogen.training.checkpoint import chosen
from astrobiogen.training.config import TrainConfig, run_config, run_folder
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import World, agreement, ending, roles, runtime
from astrobiogen.training.errors import NumericalError, UserError
from astrobiogen.training.evaluation import comparison, examination, publication, undefined
from astrobiogen.training.observe import failure
from astrobiogen.training.observe.gpu import GpuSampler
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.observe.watchdog import NOTHING_LOST, Watchdog, limits_of
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import lr_finder, memory, throughput
from astrobiogen.training.trainer import Trainer

_LOG = logging.getLogger("astrobiogen")
_NOT_FINITE = "nonfinite_report.json"
ENDED, PREEMPTED = "ended", "preempted"


def train(
    config: TrainConfig, folder: Path, resume: bool, world: World | None = None, bundle: DatasetBundle | None = None
) -> str:
    """Train in `folder` (made before) and write metrics.json and report.html there.

    Args:
        folder: the caller's alone, see `claim`.
        world: the processes that train together, each of which must call this; default: this one alone. Process 0
            writes the folder; the others log their warnings in `process-<rank>` of it.
        bundle: the data of `config`, if the caller has loaded them.

    Returns:
        `ENDED`, or `PREEMPTED` if a signal came first.

    Raises:
        UserError: anything the user can put right.
    """
    world = world or World()
    with roles.watchdog(world, folder, config) as watchdog:
        with watchdog.section("setup"):
            agreement.require(world, agreement.of_run(config, resume) if world.distributed else {})
            device = runtime.choose_device(config.runtime.device, world.local_rank if world.distributed else None)
            dtype, reason = world.on_main(lambda: precision.choose_dtype(config.precision, device))
            done = runtime.prepare(config.runtime, config.seed) | roles.facts(world, config)
            config = precision.resolved(config, dtype)
        with (
            Monitor(*roles.monitored(world, folder, config)) as monitor,
            runtime.Interrupt() as interrupt,
            GpuSampler(device, config.monitor.gpu_seconds if world.main else 0.0, monitor.record_gpu),
            astrobiogen.use_kernels(config.runtime.kernels),
        ):
            run = Run(config, device, dtype, folder, monitor, world=world)
            with watchdog.section("setup"):
                world.on_main(lambda: _begin(run, resume, done))
            roles.announce(world, config)
            how = f"{device}; {dtype} ({reason}); seed {config.seed}; {done['threads']} threads"
            _LOG.info("run folder %s; %s", folder, how)
            result = _train(run, resume, interrupt, watchdog, bundle)
    if result is not None:
        publication.show(result, folder)
    return PREEMPTED if interrupt.received else ENDED


def _train(
    run: Run, resume: bool, interrupt: runtime.Interrupt, watchdog: Watchdog, bundle: DatasetBundle | None
) -> dict[str, Any] | None:
    """Train, examine the best model, publish; what metrics.json holds, or None if a signal came, and in every process
    but the first.
    """
    config, folder, world, monitor = run.config, run.folder, run.world, run.monitor
    with watchdog.section("setup"):
        assembly = assemble.assemble(config, bundle or assemble.load_bundle(config))
        _LOG.info("data: %s", assembly.task.fingerprint)
        agreement.require(world, {"data": assembly.task.fingerprint})
        if world.main:
            undefined.tell(assembly.bundle, config.stop)
        if not roles.sharded(world, config):  # a sharded model may not fit on the device as a whole
            assembly.task.model.to(run.device)
        measured = world.on_main(lambda: throughput.measure(assembly.task, run.device, run.dtype))
        speed = dataclasses.replace(measured, peak=measured.peak * world.size)
        _LOG.info("%s", speed.describe())
        trainer = Trainer(assembly.task, run, interrupt, throughput=speed, watchdog=watchdog)
        if resume:
            trainer.saver.resume()
    machine = {"device": str(run.device), "dtype": str(run.dtype)}
    monitor.record("start", step=trainer.progress.step, seed=config.seed, **machine)
    if not _fit(trainer):
        where = (interrupt.received, trainer.progress.step, folder)
        _LOG.warning("stopped by %s at step %d; go on with: --resume %s", *where)
        if world.main:
            ending.preempted(folder, trainer.progress.step, interrupt.received, interrupt.saved, world)
        return None
    taken = trainer.saver.load_final()
    _LOG.info("examining %s", taken)
    with watchdog.section("examination") as section, _numbers_written_down(folder):

        def should_stop() -> bool:
            section.beat()
            return bool(interrupt.received)

        examined = examination.examine(assembly, trainer.model, run, should_stop)
    if not world.main:
        return None
    if examined is None:
        text = "stopped by %s while examining the trained model; do that again with: --resume %s"
        _LOG.warning(text, interrupt.received, folder)
        ending.preempted(folder, trainer.progress.step, interrupt.received, True, world)
        return None
    result, predictions = examined
    result |= {"run": _describe(trainer, taken) | monitor.lost, "environment": run_folder.ENVIRONMENT}
    publication.publish(folder, result, predictions)
    monitor.record("final", step=trainer.progress.step, test=result["model"][comparison.ALL_CELLS])
    _LOG.info("finished: %s, %s", folder / run_folder.METRICS, folder / run_folder.REPORT)
    ending.finished(folder, trainer.progress.step, trainer.progress.stopped)
    return result


def _fit(trainer: Trainer) -> bool:
    """`trainer.fit()`; what ends it for want of memory or of finite numbers is written down."""
    try:
        with _numbers_written_down(trainer.run.folder, trainer):
            return trainer.fit()
    except (RuntimeError, MemoryError) as error:
        if not failure.is_out_of_memory(error):
            raise
        report = memory.examine(error, trainer.run, trainer.updater)
        report.write(trainer.run.folder)
        raise UserError(report.line(trainer.run.folder), exit_code=1) from error


@contextlib.contextmanager
def _numbers_written_down(folder: Path, trainer: Trainer | None = None) -> Iterator[None]:
    """Write the report of a numerical stop, and of skipped updates of `trainer` also where their NaN or Inf comes from.

    Raises:
        UserError: in the place of a NumericalError, with the report's path.
    """
    try:
        yield
    except NumericalError as error:
        origin = trainer.origin(error) if trainer is not None and error.windows else ""
        details = error.details | ({"origin": origin} if origin else {})
        run_folder.write_json(folder / _NOT_FINITE, {"updates": error.windows, **details})
        text = f"{error}; {origin}" if origin else str(error)
        raise UserError(f"{text}; details: {folder / _NOT_FINITE}", exit_code=1) from error


def find_learning_rate(config: TrainConfig, folder: Path) -> int:
    """The range test: lr_finder.json and lr_finder.png in `folder`, the suggestion on stdout; the exit code.

    Raises:
        UserError: the loss never falls, or diverges at once.
    """
    console = rich.console.Console(highlight=False)
    with (
        Watchdog(folder, limits_of(config.hang), advice=NOTHING_LOST) as watchdog,
        watchdog.section("setup"),
        Monitor(folder, config.monitor) as monitor,
        astrobiogen.use_kernels(config.runtime.kernels),
    ):
        device = runtime.choose_device(config.runtime.device)
        dtype, _ = precision.choose_dtype(config.precision, device)
        runtime.prepare(config.runtime, config.seed)
        assembly = assemble.assemble(config, assemble.load_bundle(config))
        monitor.begin_progress(lr_finder.UPDATES, 0)
        with watchdog.section("step") as section:

            def advance(update: int, rate: float, loss: float) -> None:
                section.beat()
                monitor.advance(update, f"rate {rate:.1e}  loss {loss:.3f}")
                if not monitor.rich and update % config.monitor.log_every == 0:
                    _LOG.info("update %d of %d  rate %.2e  loss %.4f", update, lr_finder.UPDATES, rate, loss)

            result = lr_finder.find(assembly.task, config, device, dtype, advance)
    lr_finder.publish(result, folder)
    console.print(
        f"Suggested peak: --optimizer.learning_rate {result.suggestion:.1e} (steepest fall of the loss at "
        f"{result.steepest:.1e}); plot: {folder / 'lr_finder.png'}",
        soft_wrap=True,
    )
    return 0


def _begin(run: Run, resume: bool, done: dict[str, Any]) -> None:
    """Write down what is run where."""
    folder = run.folder
    ending.clear(folder)
    if not resume:
        run_config.write(folder, run.config)
    machine = {"device": str(run.device), "dtype": str(run.dtype)}
    run_folder.write_json(folder / _environment_name(folder), run_folder.environment(done | machine))


def _describe(trainer: Trainer, taken: chosen.Chosen) -> dict[str, Any]:
    """Facts about a finished run, examined with the weights `taken`, for metrics.json."""
    progress = trainer.progress
    return {
        "stopped": progress.stopped,
        "epochs": progress.epoch,
        # What the stored model says of itself, not what the run remembers.
        "best_epoch": taken.epoch if taken.kind == chosen.BEST else None,
        "weights": taken.facts(),
        "updates": trainer.updater.updates,
        "skipped_updates": trainer.updater.skipped,
        "training_seconds": round(progress.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def _environment_name(folder: Path) -> str:
    """environment.json, and environment-2.json, ... for the parts that a resumed run adds."""
    number = 1
    name = run_folder.ENVIRONMENT
    while (folder / name).exists():
        number += 1
        name = f"environment-{number}.json"
    return name
