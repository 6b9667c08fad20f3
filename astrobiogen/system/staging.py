"""Things that appear under their name whole or not at all: made in a folder beside it that nobody else uses.

Such a folder is called `.NAME.astrobiogen-` and eight random digits. It holds a marker file, which its maker keeps
locked; what a killed process has left is told by both, a marker and no lock, and nothing else is ever cleared away.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from astrobiogen.system.ownership import InUseError, Lock

MARKER = "made-by-astrobiogen"
NEW, OLD = "new", "old"


class BusyError(OSError):
    """Another process is making the same file or folder."""


def target_of(path: Path) -> Path:
    """Where a file or folder written to `path` really goes: a link stays, and what it points to is replaced."""
    return path.resolve()


@contextlib.contextmanager
def staged(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A place to make a file or folder at; when the block ends well, what is there becomes `path`, in one step.

    Parent folders are made. A file at `path` is replaced; a folder there only if it is empty. What killed processes
    have left of the same target is cleared away.

    Args:
        new: refuse to replace anything.

    Raises:
        FileExistsError: `new`, and `path` has appeared.
        OSError: not enough room, no permission, `path` is a folder that is not empty.
    """
    target = target_of(path)
    with workplace(target) as folder:
        part = folder / path.name
        yield part
        if new and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "has appeared meanwhile; nothing was changed", str(path))
        os.replace(part, target)


@contextlib.contextmanager
def owned(target: Path) -> Iterator[None]:
    """`target` for this process to make: of several at once one is let in. Parent folders are made.

    Raises:
        BusyError: another process is making it; says which.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(target.parent / f".{target.name}.astrobiogen-lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except InUseError as error:
            raise BusyError(errno.EBUSY, f"another process is making it ({error})", str(target)) from error
        stack.callback(lock.remove)
        yield


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on its file system, this process's alone and removed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target)
    folder, lock = _made(target)
    try:
        yield folder
    finally:
        _remove(folder)
        lock.__exit__(None, None, None)


def _remove(folder: Path) -> None:
    """Delete a folder of ours, the marker last: what cannot be deleted, or a kill leaves, is cleared away next time."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARKER:
            path.unlink(missing_ok=True)
    if {path.name for path in folder.iterdir()} <= {MARKER}:
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _made(target: Path) -> tuple[Path, Lock]:
    while True:
        folder = target.parent / f".{target.name}.astrobiogen-{secrets.token_hex(4)}"
        try:
            folder.mkdir()
            return folder, Lock(folder / MARKER).__enter__()
        except (FileExistsError, FileNotFoundError, InUseError):
            continue  # one with this name was there, or it was taken for a leftover before it was locked


def leftovers(target: Path) -> list[Path]:
    """Folders that look like ours for `target`; some may be in use."""
    name = re.compile(re.escape(f".{target.name}.astrobiogen-") + r"[0-9a-f]{8}")
    found = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(path for path in found if name.fullmatch(path.name) and (path / MARKER).is_file())


def clear(target: Path) -> None:
    """Remove what killed processes have left beside `target`; if one was ended between moving the old `target` away and
    the new one in, the old one is put back first.
    """
    for folder in leftovers(target):
        try:
            with Lock(folder / MARKER):
                if (folder / OLD).exists() and not target.exists():
                    (folder / OLD).rename(target)
                _remove(folder)
        except (InUseError, FileNotFoundError):
            continue  # it is being worked in, or another process has just removed it


def replace_folder(folder: Path, target: Path) -> None:
    """Put `folder/new` in the place of `target`, which is moved to `folder/old`; `folder` is a `workplace`."""
    if target.exists():
        target.rename(folder / OLD)
    try:
        (folder / NEW).rename(target)
    except OSError:
        if (folder / OLD).exists():
            (folder / OLD).rename(target)
        raise
