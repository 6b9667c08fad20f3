"""Rounds that ask whether the run can be left alone: what it leaves behind, what it needs, how it goes on."""

import math
import os
import shutil
import signal
import tempfile

import torch

from astrobiogen.system.ownership import Lock
from astrobiogen.training import launch
from astrobiogen.training.checkpoint import CheckpointStore, read
from astrobiogen.training.config import run_config, run_folder
from astrobiogen.training.tools import plan
from astrobiogen.training.tools.preflight.subject import NotHereError, Subject, require, succeeded

_GIB = 2**30
# Report, logs and environment of a run.
_REST_BYTES = 64 * 2**20


def consistency(subject: Subject) -> str:
    """The run was made with what was asked for, as its folder tells."""
    folder = subject.ran.folder
    written, facts = run_config.read(folder), run_folder.read_json(folder / run_folder.ENVIRONMENT) or {}
    wanted = subject.short
    require(written.data == wanted.data and written.optimizer == wanted.optimizer, "config.yaml is not what was asked")
    require((written.preset, written.seed) == (wanted.preset, wanted.seed), "another preset or seed was used")
    runtime = facts["runtime"]
    require(runtime["device"].startswith(subject.device.type), f"ran on {runtime['device']}, not {subject.device}")
    return f"config.yaml is what was asked for; {runtime['device']}, {runtime['dtype']}, seed {written.seed}"


def test_evaluation(subject: Subject) -> str:
    """The best model was examined on the test set, and there is a report."""
    folder = subject.ran.folder
    figures = (run_folder.read_json(folder / run_folder.METRICS) or {})["model"]
    whole = figures["all"]
    accuracy = whole["accuracy"]["value"] if isinstance(whole["accuracy"], dict) else whole["accuracy"]
    require(math.isfinite(accuracy) and 0 <= accuracy <= 1, f"accuracy {accuracy}")
    size = (folder / run_folder.REPORT).stat().st_size
    require(size > 0, f"{run_folder.REPORT} is empty")
    return (
        f"{whole['samples']} samples in {len(figures) - 1} cells, accuracy {accuracy:.3f}; report {size / 1e3:.0f} kB"
    )


def production(subject: Subject) -> str:
    """The folder can be written and has room for all checkpoints that are kept at a time."""
    config, place = subject.config, subject.place
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        made = plan.state_plan(subject.without_memory.task.model, config)
    each = made.weights + made.optimizer + made.average
    needed = each * (config.checkpoint.keep + 1) + made.weights * 2 + _REST_BYTES  # one more while it is written
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free at {place}, {needed / _GIB:.2f} needed for {config.checkpoint.keep} checkpoints"
    require(free >= needed, text)
    return text


def interrupted_and_resumed(subject: Subject) -> str:
    """A run that is stopped by SIGTERM and gone on with has the same weights, to the bit, as one that was not."""
    whole = subject.ran
    stopped = subject.interrupted("interrupted")
    wanted = subject.short.runtime.preempted_status
    require(stopped.status == wanted, f"exit status {stopped.status} after SIGTERM, expected {wanted}")
    succeeded(subject.run("interrupted", f"--resume={stopped.folder}", "--force"))
    states = [read(CheckpointStore(one.folder / "checkpoints", keep=2, writable=False).candidates()[0])
              for one in (whole, stopped)]  # fmt: skip
    one, other = (state.tensors["model"] for state in states)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    exact = subject.short.runtime.deterministic
    require(not (different and exact), f"{len(different)} of {len(one)} tensors differ, the first is {different[:1]}")
    same = "the same bits" if not different else f"{len(different)} differ, as runtime.deterministic is off"
    return f"{signal.SIGTERM.name}, then --resume: {len(one)} tensors, {same}{subject.stands_in}"


def clean_up(subject: Subject) -> str:
    """After a run its folder is free for others, and nothing half-written is in it."""
    folder = subject.ran.folder
    with Lock(folder / run_folder.LOCK, sign=False):
        left = [path.name for path in folder.rglob("*") if run_folder.is_aside(path) or ".tmp-" in path.name]
    require(not left, f"left behind: {', '.join(left)}")
    require((folder / run_folder.FINISHED).exists(), f"no {run_folder.FINISHED}")
    return "the folder is free, and nothing half-written is in it"


def gpu_monitor(subject: Subject) -> str:
    """Utilisation, memory, power and temperature of each card are on record."""
    if subject.device.type != "cuda":
        raise NotHereError("there is no GPU here to be watched")
    require(subject.config.monitor.gpu_seconds > 0, "monitor.gpu_seconds is 0: switched off")
    readings = subject.ran.records("gpu")
    require(bool(readings), "no reading on record")
    return f"{len(readings)} readings, every {subject.config.monitor.gpu_seconds:g} s"


def paths(subject: Subject) -> str:
    """The run wrote into its folder and nowhere else: it was started in an empty folder, which is empty still."""
    require(bool(subject.ran), "there was no run")
    left = os.listdir(subject.scratch / "elsewhere")
    require(not left, f"written outside the run folder: {', '.join(left)}")
    return "the run wrote into its own folder only"


def environment_variables(_subject: Subject) -> str:
    """Those that torchrun sets are all there, or none: a part of them is a launch that went wrong."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in needed if name in os.environ]
    require(len(there) in (0, len(needed)) or not launch.launched(), f"only {', '.join(there)} are set")
    return "none is needed" if not there else f"launched: {', '.join(f'{name}={os.environ[name]}' for name in there)}"
