"""A console that may go away: a closed terminal, `| head -1`, a full disk behind `2>`. What cannot be written there is
dropped; nothing ends because of it.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

_STANDARD = (0, 1, 2)


class BestEffort:
    """A text stream that never fails to write; everything else is the inner stream's.

    Args:
        inner: the stream; None, as Python has it where a descriptor was closed at the start, for none.
    """

    def __init__(self, inner: TextIO | None) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self._inner is not None:
            try:
                self._inner.write(text)
            except UnicodeEncodeError:
                encoding = self._inner.encoding or "ascii"
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError):  # ValueError: the stream is closed
                return len(text)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if self._inner is not None:
            with contextlib.suppress(OSError, ValueError):
                self._inner.flush()

    def isatty(self) -> bool:
        """Whether a terminal is there."""
        return self._inner is not None and not self._inner.closed and self._inner.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._inner is None:
            raise AttributeError(f"there is no console: no {name}")
        return getattr(self._inner, name)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Let nothing inside end because stdout or stderr cannot be written, and neither the end of the process: what is
    left in their buffers then goes nowhere, where Python would otherwise exit with status 120.
    """
    _occupy_closed_descriptors()
    out, error = sys.stdout, sys.stderr
    try:
        with contextlib.redirect_stdout(BestEffort(out)), contextlib.redirect_stderr(BestEffort(error)):
            yield
    finally:
        for stream in (out, error):
            _settle(stream)


def _occupy_closed_descriptors() -> None:
    """Open the null device for each closed standard descriptor: the next file opened would get its number, and what
    libraries print would be written into a checkpoint.
    """
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


def _settle(stream: TextIO | None) -> None:
    """Flush; where that fails, send what is left, and all that follows, to the null device."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):  # a stream without a descriptor is not Python's to flush at its end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


@contextlib.contextmanager
def without_native_lines(parts: Sequence[bytes]) -> Iterator[None]:
    """Leave out the lines that native code prints on stderr meanwhile and that hold one of `parts`; everything else
    appears afterwards. Where stderr or a temporary file cannot be had, nothing is left out.
    """
    screen = BestEffort(sys.stderr)
    with contextlib.ExitStack() as stack:
        try:
            aside = stack.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
            stack.callback(os.close, kept)
        except OSError:
            aside, kept = None, -1
        if aside is None:
            yield
            return
        screen.flush()
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            screen.flush()
            os.dup2(kept, 2)
            aside.seek(0)
            lines = [line for line in aside.read().splitlines(keepends=True) if not any(part in line for part in parts)]
            with contextlib.suppress(OSError):
                os.write(2, b"".join(lines))
