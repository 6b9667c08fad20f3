"""How a run says that it has ended, to schedulers: an exit status and a file in the run folder."""

import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from astrobiogen.training.config import run_folder
from astrobiogen.training.config.run_folder import FINISHED, PREEMPTED
from astrobiogen.training.distributed.world import World
from astrobiogen.training.errors import UserError

_LOG = logging.getLogger("astrobiogen")


def clear(folder: Path) -> None:
    """Take away what an earlier part of the run has said of its end: the run goes on."""
    for name in (PREEMPTED, FINISHED):
        (folder / name).unlink(missing_ok=True)


def preempted(folder: Path, step: int, reason: str, saved: bool, world: World) -> None:
    """Write the file PREEMPTED: stopped by a signal, and to be gone on with.

    Args:
        step: micro-batches done.
        reason: name of the signal.
        saved: whether there is a checkpoint of this step; else the run goes on from an older one.
    """
    _write(folder / PREEMPTED, {"step": step, "reason": reason, "saved": saved, "go_on": command(folder, world)})


def finished(folder: Path, step: int, reason: str) -> None:
    """Write the file FINISHED: trained and examined, metrics.json and report.html are there."""
    _write(folder / FINISHED, {"step": step, "reason": reason})


def _write(path: Path, facts: Mapping[str, object]) -> None:
    try:
        run_folder.write_json(path, facts)
    except OSError as error:
        _LOG.error("%s could not be written (%s)", path, error.strerror or error)


def command(folder: Path, world: World) -> str:
    """The command that goes on with the run, from any working directory."""
    start = "python"
    if world.distributed:
        start += f" -m torch.distributed.run --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world.size)}"
    return f"{start} -m astrobiogen.train --resume {shlex.quote(str(folder.resolve()))}"


def status(preempted_status: int, environment: Mapping[str, str]) -> int:
    """Exit status of a process whose run a signal has stopped: `preempted_status`; 0 under torchrun's agent, which
    would take anything else for a failure of the worker, kill the others and report an error.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in environment else preempted_status


def said_before(folder: Path) -> str:
    """For a run that is asked to go on although it has ended.

    Raises:
        UserError: the file FINISHED cannot be read.
    """
    try:
        facts = run_folder.read_json(folder / FINISHED) or {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / FINISHED}: cannot be read: {error}", exit_code=1) from error
    return (
        f"{folder}: finished before, at step {facts.get('step', '?')} ({facts.get('reason', '?')}); "
        f"figures: {folder / run_folder.METRICS}"
    )
