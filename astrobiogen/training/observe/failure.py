"""The way commands end that fail: one line, never a traceback, and what is left behind where that is possible."""

import contextlib
import datetime
import errno
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from astrobiogen.system import console
from astrobiogen.system.extras import MissingExtraError
from astrobiogen.training.config.run_folder import CRASH, LOG
from astrobiogen.training.errors import UserError

# Full, over quota, read-only, larger than allowed, broken: the disk's trouble, not the program's.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_APPENDED = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def guarded(command: Callable[[], int], folder: Callable[[], Path | None]) -> int:
    """Run `command` and turn every failure into one line on stderr and an exit code. The line is also the last one of
    train.log in `folder()`, if there is one by then; the traceback of a bug goes to a file.
    """
    try:
        return command()
    except UserError as error:
        message, code = str(error), error.exit_code
    except MissingExtraError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted before there was anything to save", 130
    except Exception as error:  # the outermost frame: whatever it is, the user gets one line and a file
        code = 1
        if is_out_of_memory(error):
            message = _memory_advice(error)
        elif isinstance(error, OSError) and error.errno in _DISK:
            place = f"{error.filename}: " if error.filename else ""
            message = f"{place}{error.strerror}; checkpoints saved before are untouched"
        else:
            text = " ".join(str(error).split())[:300]
            message = f"internal: {type(error).__name__}: {text} (details: {write_down(folder())})"
    note(folder(), f"error: {message}")
    sys.stderr.write(f"error: {message}\n")
    return code


def command(run: Callable[[Sequence[str]], int], arguments: Sequence[str] | None) -> int:
    """A command without a folder that outlives it: `run` on `arguments` (those of the process if None), with the
    library's log on stderr. Returns the exit status: 0 done, 1 failed, 2 wrong input, or what `run` gives.
    """
    given = sys.argv[1:] if arguments is None else arguments
    with console.best_effort():
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("astrobiogen").setLevel(logging.INFO)
        return guarded(lambda: run(given), lambda: None)


def _memory_advice(error: BaseException) -> str:
    """For what happens outside training, which has a report of its own."""
    return (
        f"out of memory: {' '.join(str(error).split())[:200]}; a smaller --evaluation.batch_size, --data.batch_size or "
        "--preset needs less; --plan shows where the bytes go"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the CPU."""
    said = any(
        words in str(error) for words in ("can't allocate memory", "CUDA error: out of memory", "std::bad_alloc")
    )
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


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
