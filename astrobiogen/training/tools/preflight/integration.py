"""Rounds that look at a short run of the command itself, made with the configuration of the run."""

import math
import re
import shutil

import numpy as np
import torch

from astrobiogen.training import evaluation
from astrobiogen.training.checkpoint import MANIFEST, CheckpointStore, read, verify
from astrobiogen.training.config import parser, run_folder
from astrobiogen.training.errors import CheckpointError, NumericalError
from astrobiogen.training.evaluation import stopping
from astrobiogen.training.evaluation.progress import Progress
from astrobiogen.training.observe import failure
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import trained
from astrobiogen.training.tools.preflight.subject import NotHereError, Subject, require, succeeded

_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?:DEBUG|INFO|WARNING|ERROR) \S", re.MULTILINE)
# Relative difference of a validation loss computed again in another process.
_AGAIN = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# No memory has as many bytes; an index has.
_TOO_MUCH = 2**55


def training_loop(subject: Subject) -> str:
    """As many updates as the samples make, with finite losses and norms, clipped and scheduled."""
    steps = subject.ran.records("step")
    data = subject.short.data
    each = math.ceil(math.ceil(data.limit / data.batch_size) / data.accumulation)
    require(len(steps) == each * subject.short.epochs, f"{len(steps)} updates, expected {each * subject.short.epochs}")
    taken = [step for step in steps if not step["skipped"]]
    require(bool(taken), "every update was skipped")
    bad = [step["update"] for step in taken if not math.isfinite(step["loss"] + step["gradient_norm"])]
    require(not bad, f"loss or gradient norm of updates {bad} is not finite")
    rates = {step["learning_rate"] for step in steps}
    require(len(rates) > 1 or subject.short.schedule.name == "constant", "the learning rate never changes")
    first, last = taken[0], taken[-1]
    return (
        f"{len(taken)} of {len(steps)} updates of {data.batch_size} x {data.accumulation} samples on {subject.device}, "
        f"loss {first['loss']:.3f} to {last['loss']:.3f}, gradients clipped at {subject.short.optimizer.clip_norm:g} "
        f"from {max(step['gradient_norm'] for step in taken):.2f}{subject.stands_in}"
    )


def checkpoints(subject: Subject) -> str:
    """A checkpoint holds all that it shall, is as its checksums say, and a damaged one is passed over."""
    source = subject.ran.folder / "checkpoints"
    newest = CheckpointStore(source, keep=2, writable=False).candidates()[0]
    manifest = verify(newest)
    content = read(newest)
    state = content.documents["training"]
    missing = {"updater", "progress", "rng", "config", "fingerprint"} - state.keys()
    require(not missing, f"{newest.name} lacks {', '.join(sorted(missing))}")
    absent = {"saved", "metrics", "torch"} - manifest.keys()
    require(not absent, f"{MANIFEST} lacks {', '.join(sorted(absent))}")
    copy = subject.scratch / "damaged"
    shutil.copytree(source, copy)
    store = CheckpointStore(copy, keep=subject.short.checkpoint.keep)
    damaged, older = store.candidates()[:2]
    weights = damaged / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(bytes(raw))
    try:
        verify(damaged)
    except CheckpointError:
        found = store.load_newest()
        require(found is not None and found[0] == older, "the damaged checkpoint was not passed over")
        return (
            f"{newest.name} of {manifest['saved']}: weights, optimizer, schedule, loss scale, generators, "
            f"configuration, figures; a flipped bit is noticed and {older.name} used"
        )
    raise ValueError("a flipped bit was not noticed")


def validation_loop(subject: Subject) -> str:
    """The validation loss on record is what the stored best model gives, in another process."""
    recorded = [record for record in subject.ran.records("epoch") if record["best"]][-1]["validation"]
    result = _validated(subject)
    dtype = precision.choose_dtype(subject.short.precision, subject.device)[0]
    close = math.isclose(result.loss, recorded["loss"], rel_tol=_AGAIN[dtype])
    require(close, f"loss {recorded['loss']} on record, {result.loss} again")
    return (
        f"loss {recorded['loss']:.4f} of {len(result.fraction)} samples on record and {result.loss:.4f} again, "
        f"accuracy {recorded['accuracy']:.3f}{subject.stands_in}"
    )


def _validated(subject: Subject) -> evaluation.Evaluation:
    task, device = subject.assembly.task, subject.device
    result = evaluation.evaluate(
        trained.find(subject.ran.folder).model(subject.assembly.bundle.spec).to(device),
        task.loss_function,
        task.validation,
        task.collate,
        batch_size=subject.short.evaluation.batch_size,
        device=device,
        dtype=precision.choose_dtype(subject.short.precision, device)[0],
        order=task.validation_order,
        counts=task.validation_counts,
    )
    assert result is not None  # nothing stops it
    return result


def distributed(subject: Subject) -> str:
    """Two processes train together by the strategy of the configuration: on two GPUs, or on the CPU."""
    if not torch.distributed.is_available():
        raise NotHereError("this PyTorch has no torch.distributed")
    where = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    ended = succeeded(subject.run("distributed", f"--runtime.device={where}", "--epochs=1", processes=2))
    facts = (run_folder.read_json(ended.folder / run_folder.ENVIRONMENT) or {})["runtime"]
    strategy = subject.short.distributed.strategy
    require((facts["processes"], facts["strategy"]) == (2, strategy), f"got {facts}, expected 2, {strategy}")
    losses = [step["loss"] for step in ended.records("step") if not step["skipped"]]
    require(bool(losses) and all(map(math.isfinite, losses)), f"losses {losses}")
    alone = len([step for step in subject.ran.records("step") if step["epoch"] == 0])
    made = len(ended.records("step"))
    require(made == alone, f"{made} updates in two processes, {alone} in one")
    return f"two processes on {where}, {strategy}: {made} updates, as many as one makes{subject.stands_in}"


def logging_(subject: Subject) -> str:
    """The log has time and level in each line, on the console too; the records and the origin of the run are whole."""
    ended = subject.ran
    text = (ended.folder / run_folder.LOG).read_text(encoding="utf-8")
    require(len(_LINE.findall(text)) >= 5, f"{run_folder.LOG}: lines without time and level")
    require("INFO" in ended.messages, "nothing on the console")
    counts = {event: len(ended.records(event)) for event in ("start", "step", "epoch", "saved", "final")}
    require(all(counts.values()), f"{run_folder.RECORDS}: {counts}")
    facts = run_folder.read_json(ended.folder / run_folder.ENVIRONMENT) or {}
    absent = {"libraries", "git", "command", "runtime"} - facts.keys()
    require(not absent, f"{run_folder.ENVIRONMENT} lacks {', '.join(sorted(absent))}")
    monitor = subject.short.monitor
    sent = [name for name in ("tensorboard", "wandb") if getattr(monitor, name) not in (False, "off")]
    return f"{len(text.splitlines())} lines, records {counts}; copies to: {', '.join(sent) or 'no tracker'}"


def early_stopping(subject: Subject) -> str:
    """A figure that does not get better ends a run after `patience` epochs, the target and the clock end one too."""
    result, config = _validated(subject), subject.config
    said, stop = [], config.stop
    if stop.metric != "last" and stop.patience and math.isfinite(result.figure(stop.metric)):
        progress = Progress()
        while progress.epoch < config.epochs:
            stopping.enter(progress, stop, result, stopping.judge(progress, stop, result))
            progress.begin_epoch()
            if stopping.reason(progress, config, result.predictions).startswith("early"):
                break
        expected = min(stop.patience + 1, config.epochs)
        require(progress.epoch == expected, f"ended after {progress.epoch} epochs, expected {expected}")
        said.append(f"without a better {stop.metric} after {progress.epoch} of {config.epochs} epochs")
    progress = Progress(seconds=stop.max_hours * 3600 + 1)
    require(stopping.time_limit(progress, config), "the time limit does not end it")
    said.append(f"after {stop.max_hours:g} hours")
    if stop.target_accuracy < 1:
        said.append(_target(subject, result))
    return f"it ends {'; '.join(said)}"


def _target(subject: Subject, result: evaluation.Evaluation) -> str:
    """The target is reached by right answers, of many planets; not by wrong ones."""
    target, old = subject.config.stop.target_accuracy, result.predictions
    many = math.ceil(8 / (1 - target) / len(old.label)) * 4
    label = np.tile(old.label, many)
    groups = np.arange(len(label))
    answers = {name: np.where(label == wanted, 0.99, 0.01) for name, wanted in (("right", 1), ("wrong", 0))}
    made = {name: type(old)(answer, label, groups, groups, old.cell * many) for name, answer in answers.items()}
    ends = {name: stopping.reason(Progress(), subject.config, one) for name, one in made.items()}
    require(ends["right"].startswith("target") and not ends["wrong"], f"target accuracy {target}: {ends}")
    return f"at {target:.0%} accuracy with 95 % confidence"


def errors(subject: Subject) -> str:
    """Want of memory, NaN, absent modalities and unknown keys end in words, not in wrong numbers."""
    try:
        torch.empty(_TOO_MUCH, dtype=torch.uint8)
    except RuntimeError as error:
        require(failure.is_out_of_memory(error), f"not taken as want of memory: {error}")
    assembly, made = subject.assembly, subject.batch()
    model = assembly.task.model
    for name in evaluation.MODALITIES:
        masked = evaluation.mask_modality(made, name)
        with evaluation.frozen(model), torch.no_grad():
            value = float(assembly.task.loss_function(model(masked), masked)[0])
        require(math.isfinite(value), f"loss {value} without {name}")
    refused = _refusals(subject)
    return f"want of memory is recognised; each modality may be absent; refused: {', '.join(refused)}"


def _refusals(subject: Subject) -> list[str]:
    task, told = subject.assembly.task, []

    def broken(outputs: object, batch: object, *factors: object) -> object:
        total, parts = task.loss_function(outputs, batch, *factors)  # type: ignore[arg-type]
        return total * math.nan, parts

    options = {"batch_size": 4, "device": torch.device("cpu"), "order": task.validation_order}
    try:
        evaluation.evaluate(task.model, broken, task.validation, task.collate, **options)  # type: ignore[arg-type]
    except NumericalError:
        told.append("a loss of NaN")
    try:
        parser.from_dict({"epocs": 3})
    except ValueError:
        told.append("an unknown key")
    require(len(told) == 2, f"only these were refused: {told}")
    return told
