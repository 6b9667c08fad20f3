"""Whose a run folder is: made and locked before anything in it is looked at, and emptied by its owner only."""

import contextlib
import dataclasses
import datetime
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from astrobiogen.system.ownership import InUseError, Lock
from astrobiogen.training.config import run_folder
from astrobiogen.training.config.run_folder import CONFIG, CRASH, ENVIRONMENT, FINISHED, LOCK, LOG, RECORDS
from astrobiogen.training.errors import UserError

NEW, BEGUN, DONE = "new", "begun", "finished"
# What the beginning of a run writes, before and after its configuration.
_BEGINNING = {RECORDS, LOG, ENVIRONMENT, CONFIG}
_OF_A_PROCESS = re.compile(r"process-[0-9]+")
_TRIES = 1000
_LOOKS, _BETWEEN_LOOKS = 4, 0.01


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run folder that is this process's.

    Attributes:
        folder: where it is.
        state: `new`: nothing of a run is in it; `begun`: a run with its configuration; `finished`: one that has ended.
    """

    folder: Path
    state: str


@contextlib.contextmanager
def claimed(output: str, preset: str, *, go_on: bool = False) -> Iterator[Claim]:
    """The folder of a new run, for this process alone until the block ends; without a name a new one,
    `runs/<date>-<preset>`, with a number behind it if that one is taken.

    A `UserError` inside takes a new folder back in which no training began, so that the command, put right, can use
    its name. A folder in which a killed process left no more than the beginning of a run counts as new.

    Args:
        go_on: a folder that holds a run is welcome too.

    Raises:
        UserError: another process has the folder; it holds something else, or a run and not `go_on`; it is a file, or
            cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder, lock, made = _enter(stack, output, preset)
            state = _state(folder)
            if state == "" or (state != NEW and not go_on):
                raise _taken(folder)
            lock.sign()
            if state == NEW:
                _sweep(_remnants(folder))
        except OSError as error:
            raise UserError(
                f"--output: {error.filename or output} cannot be written: {error.strerror or error}"
            ) from error
        try:
            yield Claim(folder, state)
        except UserError:
            if state == NEW:
                _take_back(folder, lock, made)
            raise


@contextlib.contextmanager
def resumed(folder: Path) -> Iterator[Claim]:
    """The folder of a run that goes on, for this process alone until the block ends.

    Raises:
        UserError: another process is training in it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Lock(folder / LOCK))
            _sweep([path for path in folder.iterdir() if run_folder.is_aside(path)])
        except InUseError as error:
            raise in_use(folder, error) from error
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}", exit_code=1) from error
        yield Claim(folder, DONE if (folder / FINISHED).exists() else BEGUN)


def in_use(folder: Path, error: InUseError) -> UserError:
    """The refusal of a folder that another process has."""
    return UserError(f"{folder}: another process is training in this folder ({error})", exit_code=1)


def _enter(stack: contextlib.ExitStack, output: str, preset: str) -> tuple[Path, Lock, bool]:
    """The folder, its lock, which is held until `stack` ends, and whether the folder was made here."""
    for _ in range(_TRIES):
        folder, made = _named(Path(output)) if output else (_unnamed(preset), True)
        lock = Lock(folder / LOCK, sign=False)
        try:
            if not made and _is_foreign(folder):
                raise _taken(folder)
            stack.enter_context(lock)
            return folder, lock, made
        except InUseError as error:
            raise in_use(folder, error) from error
        except FileNotFoundError:
            continue  # its owner has taken it back since
    raise UserError(f"--output: {output} is made and removed by other processes all the time; name another folder")


def _named(folder: Path) -> tuple[Path, bool]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
        return folder, True
    except FileExistsError:
        if folder.is_symlink() and not folder.exists():
            raise FileNotFoundError(errno.ENOENT, "it is a link that points nowhere", str(folder)) from None
        return folder, False


def _unnamed(preset: str) -> Path:
    """A folder that no other process has made: `mkdir` tells."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    Path("runs").mkdir(exist_ok=True)
    for number in range(1, _TRIES):
        folder = Path("runs") / (f"{stamp}-{preset}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"--output: {_TRIES} runs began in runs/ within this second; name a folder")


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds things and no lock: the lock is the first thing in a run folder, and the last. Looked at
    several times: of one that others make and take back meanwhile, a single look may see parts of two.
    """
    if not stat.S_ISDIR(folder.stat().st_mode):
        return True
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_LOOKS)
        if not os.listdir(folder) or os.path.lexists(folder / LOCK):
            return False
    return True


def _taken(folder: Path) -> UserError:
    ending = f"; or go on with the run in it by --resume {folder}" if (folder / CONFIG).is_file() else ""
    return UserError(f"--output: {folder} exists and is not an empty folder; name another one{ending}")


def _state(folder: Path) -> str:
    """What a locked folder holds; empty if it is not the folder of a run."""
    if (folder / CONFIG).is_file():
        return DONE if (folder / FINISHED).exists() else BEGUN
    known = {folder / LOCK, folder / CRASH, *_remnants(folder)}
    return "" if set(folder.iterdir()) - known else NEW


def _remnants(folder: Path) -> list[Path]:
    """What of the beginning of a run lies in `folder`, its lock left out: files, and the logs of other processes."""
    return [path for path in folder.iterdir() if path.name != LOCK and _is_remnant(path)]


def _is_remnant(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return bool(_OF_A_PROCESS.fullmatch(path.name)) and all(map(_is_remnant, path.iterdir()))
    return path.is_file() and (path.name in _BEGINNING or run_folder.is_aside(path))


def _sweep(paths: list[Path]) -> None:
    """Delete remnants."""
    for path in paths:
        if path.is_dir():
            _sweep(list(path.iterdir()))
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _take_back(folder: Path, lock: Lock, made: bool) -> None:
    """Empty a folder in which no training began; with anything else in it all of it stays."""
    remnants = _remnants(folder)
    if set(folder.iterdir()) - {*remnants, folder / LOCK}:
        return
    _sweep(remnants)
    lock.remove()
    if made:
        with contextlib.suppress(OSError):  # somebody has put something there
            folder.rmdir()
