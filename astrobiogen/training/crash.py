"""What a command that fails leaves behind, wherever that is still possible."""

import contextlib
import datetime
import os
import tempfile
import traceback
from pathlib import Path

from astrobiogen.training.run_folder import CRASH, LOG

_APPENDED = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def write_down(folder: Path | None) -> str:
    """Write the traceback of the exception that is being handled into crash.log in `folder`, or into a new file in the
    temporary folder; returns where it is, or why it is nowhere.
    """
    text = traceback.format_exc()
    if folder is not None:
        with contextlib.suppress(OSError):
            _append(folder / CRASH, text)
            return str(folder / CRASH)
    try:
        descriptor, name = tempfile.mkstemp(prefix="astrobiogen-crash-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"none, they could not be written: {error.strerror or error}"
    return name


def note(folder: Path | None, line: str) -> None:
    """Make `line` the last one of train.log in `folder`, if that is possible: the console may be gone."""
    if folder is not None and (folder / LOG).is_file():
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
        with contextlib.suppress(OSError):
            _append(folder / LOG, f"{now} ERROR {line}\n")


def _append(path: Path, text: str) -> None:
    """Append to a file; a link is not followed.

    Raises:
        OSError: it is a link, or cannot be written.
    """
    descriptor = os.open(path, _APPENDED, 0o666)
    with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
