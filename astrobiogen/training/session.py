"""A whole run: prepare, train, examine the best model, report."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import torch
import yaml

import astrobiogen
from astrobiogen import data
from astrobiogen.training import (
    agreement,
    assemble,
    baselines,
    chosen,
    distributed_session,
    ending,
    evaluation,
    final,
    lr_finder,
    memory,
    metrics,
    precision,
    report,
    run_folder,
    runtime,
    throughput,
    undefined,
)
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.config_dict import to_dict
from astrobiogen.training.distributed import World
from astrobiogen.training.errors import NumericalError, UserError
from astrobiogen.training.evaluation import MODALITIES
from astrobiogen.training.gpu import GpuSampler
from astrobiogen.training.monitor import Monitor, read_log
from astrobiogen.training.trainer import Trainer
from astrobiogen.training.watchdog import Watchdog

_LOG = logging.getLogger("astrobiogen")
_PLAIN_WIDTH = 150
_CONTROL = "near-surface temperature"
_NOT_FINITE = "nonfinite_report.json"
ENDED, PREEMPTED = "ended", "preempted"


def train(config: TrainConfig, folder: Path, resume: bool, world: World | None = None) -> str:
    """Train in `folder` (made before) and write metrics.json and report.html there.

    Args:
        folder: the caller's alone, see `claim`.
        world: the processes that train together, each of which must call this; default: this one alone. Process 0
            writes the folder; the others log their warnings in `process-<rank>` of it.

    Returns:
        `ENDED`, or `PREEMPTED` if a signal came first.

    Raises:
        UserError: anything the user can put right.
    """
    world = world or World()
    agreement.require(world, agreement.of_run(config, resume) if world.distributed else {})
    device = runtime.choose_device(config.runtime.device, world.local_rank if world.distributed else None)
    dtype, reason = world.on_main(lambda: precision.choose_dtype(config.precision, device))
    done = runtime.prepare(config.runtime, config.seed) | distributed_session.facts(world, config)
    config = precision.resolved(config, dtype)
    with (
        Monitor(*distributed_session.monitored(world, folder, config)) as monitor,
        runtime.Interrupt() as interrupt,
        GpuSampler(device, config.monitor.gpu_seconds if world.main else 0.0, monitor.record_gpu),
        astrobiogen.use_kernels(config.runtime.kernels),
        distributed_session.watchdog(world, folder, config) as watchdog,
    ):
        world.on_main(lambda: _begin(config, folder, resume, done | {"device": str(device), "dtype": str(dtype)}))
        distributed_session.announce(world, config)
        how = f"{device}; {dtype} ({reason}); seed {config.seed}; {done['threads']} threads"
        _LOG.info("run folder %s; %s", folder, how)
        result = _train(config, folder, resume, monitor, interrupt, device, dtype, world, watchdog)
    if result is not None:
        show(result, folder)
    return PREEMPTED if interrupt.received else ENDED


def _train(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    monitor: Monitor,
    interrupt: runtime.Interrupt,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    watchdog: Watchdog,
) -> dict[str, Any] | None:
    """Train, examine the best model, publish; what metrics.json holds, or None if a signal came, and in every process
    but the first.
    """
    with watchdog.section("setup"):
        assembly = assemble.assemble(config, assemble.load_bundle(config))
        _LOG.info("data: %s", assembly.task.fingerprint)
        agreement.require(world, {"data": assembly.task.fingerprint})
        if world.main:
            undefined.tell(assembly.bundle, config.stop)
        if not distributed_session.sharded(world, config):  # a sharded model may not fit on the device as a whole
            assembly.task.model.to(device)
        measured = world.on_main(lambda: throughput.measure(assembly.task, device, dtype))
        speed = dataclasses.replace(measured, peak=measured.peak * world.size)
        rates = (speed.flops_per_sample / 1e9, speed.peak / 1e9, dtype)
        _LOG.info("%.3g GFLOP per sample; matrix products reach %.3g GFLOP/s in %s", *rates)
        parts = (assembly.task, config, folder, monitor, interrupt)
        trainer = Trainer(*parts, device=device, dtype=dtype, throughput=speed, world=world, watchdog=watchdog)
        if resume:
            trainer.saver.resume()
    monitor.record("start", step=trainer.progress.step, seed=config.seed, device=str(device), dtype=str(dtype))
    if not _fit(trainer, folder, config, device):
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

        examined = examine(assembly, trainer.model, config, device, dtype, should_stop, world)
    if not world.main:
        return None
    if examined is None:
        text = "stopped by %s while examining the trained model; do that again with: --resume %s"
        _LOG.warning(text, interrupt.received, folder)
        ending.preempted(folder, trainer.progress.step, interrupt.received, True, world)
        return None
    result, predictions = examined
    result |= {"run": _describe(trainer, taken) | monitor.lost, "environment": run_folder.ENVIRONMENT}
    publish(folder, result, predictions)
    monitor.record("final", step=trainer.progress.step, test=result["model"][final.ALL_CELLS])
    _LOG.info("finished: %s, %s", folder / run_folder.METRICS, folder / run_folder.REPORT)
    ending.finished(folder, trainer.progress.step, trainer.progress.stopped)
    return result


def _fit(trainer: Trainer, folder: Path, config: TrainConfig, device: torch.device) -> bool:
    """`trainer.fit()`; what ends it for want of memory or of finite numbers is written down."""
    try:
        with _numbers_written_down(folder, trainer):
            return trainer.fit()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        report = memory.examine(error, trainer.updater, config, device)
        report.write(folder)
        raise UserError(report.line(folder), exit_code=1) from error


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
    device = runtime.choose_device(config.runtime.device)
    dtype, _ = precision.choose_dtype(config.precision, device)
    runtime.prepare(config.runtime, config.seed)
    console = rich.console.Console(highlight=False)
    with Monitor(folder, config.monitor) as monitor, astrobiogen.use_kernels(config.runtime.kernels):
        assembly = assemble.assemble(config, assemble.load_bundle(config))
        monitor.begin_progress(lr_finder.UPDATES, 0)

        def advance(update: int, rate: float, loss: float) -> None:
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


def _begin(config: TrainConfig, folder: Path, resume: bool, done: dict[str, Any]) -> None:
    """Write down what is run where."""
    ending.clear(folder)
    if not resume:
        run_folder.write_text(folder / run_folder.CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))
    run_folder.write_json(folder / _environment_name(folder), run_folder.environment(done))


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


def _baseline_probabilities(bundle: data.DatasetBundle, seed: int) -> dict[str, metrics.Floats]:
    """P(class 1) of every baseline on `bundle.test`, in its order."""
    train, validation, test = (
        assemble.baseline_inputs(samples) for samples in (bundle.train, bundle.validation, bundle.test)
    )
    for features, samples in ((train, bundle.train), (validation, bundle.validation), (test, bundle.test)):
        if bad := np.flatnonzero(~(np.isfinite(features.flat).all(1) & np.isfinite(features.params).all(1))).tolist():
            first = samples.pairs[bad[0]]
            raise NumericalError(
                f"baselines: features of {len(bad)} of {len(samples)} {samples.name} samples are NaN or Inf, of the "
                f"first: {first.climate}, {first.organism}; --evaluation.baselines false leaves the baselines out"
            )
    return baselines.predict(train, validation, test, seed)


def examine(
    assembly: assemble.Assembly,
    model: torch.nn.Module,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> tuple[dict[str, Any], dict[str, metrics.Predictions]] | None:
    """Test figures of `model` with intervals, baselines and ablation as JSON data, and the predictions behind them;
    None if `should_stop`, polled before each batch, said so, and in every process of `world` but the first: all share
    the passes over the data, the first draws the conclusions.

    Raises:
        UserError: the data set has no test samples.
    """
    test = assembly.bundle.test
    if not len(test):
        raise UserError("data: got 0 test samples, expected at least one", exit_code=1)
    task, settings, seed = assembly.task, config.evaluation, config.seed
    run = functools.partial(
        evaluation.evaluate,
        *(model, task.loss_function),
        collate=task.collate,
        batch_size=settings.batch_size,
        device=device,
        dtype=dtype,
        should_stop=should_stop,
        world=world,
        what="test",
    )
    whole = run(test, order=assemble.evaluation_order(test, config), counts=assemble.TermCounts(test))
    if whole is None:
        return None
    limit = settings.ablation_limit or len(test)
    # All passes over the data come first: the other processes take part in them and are then done.
    hidden = _hidden(run, test, limit, config) if settings.ablation else {}
    if None in hidden.values() or (world is not None and not world.main):
        return None
    predictions = {"model": whole.predictions}
    result: dict[str, Any] = {
        "preset": config.preset,
        "seed": seed,
        "data": task.fingerprint,
        "interval_method": final.INTERVAL_METHOD,
        "bootstrap_replicates": settings.bootstrap,
        "model": final.by_cell(whole.predictions, settings.bootstrap, seed),
        "total_loss": whole.loss,
        "loss_parts": whole.parts,
        "fraction_rmse": whole.summary()["fraction_rmse"],
        "modality_weights": whole.modality_weights,
    }
    if settings.baselines:
        _LOG.info("fitting the baselines")
        probabilities = _baseline_probabilities(assembly.bundle, seed)
        result["baselines"] = final.compare(whole.predictions, probabilities, settings.bootstrap, seed)
        result["against_majority_class"] = final.against_majority(result["baselines"])
        result["against_additive_new_planet"] = final.against_additive(result["baselines"])
        for name, probability in probabilities.items():
            predictions[name] = dataclasses.replace(whole.predictions, probability=probability)
    if settings.ablation:
        keep = np.isin(np.arange(len(test)), assemble.spread(len(test), limit))
        control = hidden.pop(_CONTROL)
        result["ablation"] = final.ablate(hidden, whole.predictions.select(keep), settings.bootstrap, seed)
        result["control"] = final.control(control.predictions, whole.predictions, settings.bootstrap, seed)
    return None if should_stop() else (result, predictions)


def _hidden(
    run: Callable[..., evaluation.Evaluation | None], test: data.HabitatDataset, limit: int, config: TrainConfig
) -> dict[str, Any]:
    """`run` with each modality hidden, on `limit` samples, and with the near-surface temperature hidden, on all; None
    where it was stopped.
    """
    part = assemble.limited(test, limit)
    _LOG.info("masking one modality after the other on %d test samples", len(part))
    order = assemble.evaluation_order(part, config)
    results: dict[str, Any] = {
        name: run(part, order=order, masked=name, what=f"test without {name}") for name in MODALITIES
    }
    order = assemble.evaluation_order(test, config)
    return results | {_CONTROL: run(data.without_near_surface(test), order=order, what=f"test without {_CONTROL}")}


def publish(folder: Path, result: dict[str, Any], predictions: Mapping[str, metrics.Predictions]) -> None:
    """Write metrics.json and report.html."""
    run_folder.write_json(folder / run_folder.METRICS, result)
    log = folder / "log.jsonl"
    records = read_log(log).thinned(report.MOST_RECORDS)
    facts, used = (run_folder.read_json(folder / name) for name in (run_folder.ENVIRONMENT, memory.REPORT))
    page = report.render(result, records, predictions, memory=used, environment=facts)
    run_folder.write_text(folder / run_folder.REPORT, page)


def _signed(item: dict[str, Any]) -> str:
    """A paired difference with its interval and verdict."""
    if None in (item["value"], item["low"], item["high"]):
        return "undefined"
    verdict = "better" if item["better"] else "no difference shown"
    return f"{item['value']:+.3f} [{item['low']:+.3f}, {item['high']:+.3f}] ({verdict})"


def show(result: dict[str, Any], folder: Path | None) -> None:
    """Print the closing table on stdout, and where the rest is (`folder`), if it was written."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_PLAIN_WIDTH)
    table = rich.table.Table(
        *report.TABLE_HEAD, title=f"Test set ({result['preset']}, seed {result['seed']})", box=rich.box.ASCII
    )
    for row in report.figures_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(final.INTERVAL_METHOD, style="dim")
    if "ablation" in result:
        readings = ", ".join(f"{name}: {report.verdict(item)}" for name, item in result["ablation"].items())
        console.print(f"Masking a modality at evaluation, by cross-entropy: {readings}")
    if "against_majority_class" in result:
        words = {"accuracy": "accuracy", "auroc": "AUROC", "loss": "cross-entropy"}
        readings = ", ".join(f"{words[n]} {_signed(item)}" for n, item in result["against_majority_class"].items())
        console.print(f"Model minus majority class, paired: {readings}")
    if result.get("against_additive_new_planet"):
        items = result["against_additive_new_planet"].items()
        readings = ", ".join(f"{name} {_signed(item)}" for name, item in items)
        console.print(f"Model minus planet + organism effects on new planets, paired: {readings}")
    if reason := result["run"]["weights"].get("reason"):
        taken = result["run"]["weights"]
        console.print(f"Not the best model ({reason}): figures of {taken['checkpoint']}, epoch {taken['epoch']}")
    if folder is not None:
        console.print(f"Full figures: {folder / run_folder.METRICS}; plots: {folder / run_folder.REPORT}")
