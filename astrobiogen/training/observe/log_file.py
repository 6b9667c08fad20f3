"""Logs whose lines reach the operating system at once, or are counted as lost: a full disk costs lines, not the run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class Appender:
    """Appends whole lines to a file. It is said once when one is lost, and a line with their number precedes the next
    one that finds room.

    Args:
        file: unbuffered, opened for appending.
        name: of the file, for what is said.
        logger: says what is lost.
        torn: the file ends within a line.

    Attributes:
        file: where lines go; may be replaced between two lines.
        lost: lines that could not be written.
    """

    def __init__(self, file: BinaryIO, name: str, logger: logging.Logger, *, torn: bool = False) -> None:
        self.file = file
        self.lost = 0
        self._name, self._logger = name, logger
        self._torn = torn
        self._missing = 0

    def append(self, line: str, gap: Callable[[int], str]) -> int:
        """Write `line`; `gap` words the number of those that were lost before it. Returns the bytes written, 0 if it is
        lost.
        """
        lines = [gap(self._missing), line, ""] if self._missing else [line, ""]
        data = "\n".join(["", *lines] if self._torn else lines).encode(errors="backslashreplace")
        try:
            written = self.file.write(data) or 0
            reason = "the disk is full"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written == len(data):
            self._torn, self._missing = False, 0
            return written
        self._torn = self._torn or written > 0
        self.lost += 1
        self._missing += 1
        if self._missing == 1:
            self._logger.error("%s cannot be written (%s); training goes on without it", self._name, reason)
        return 0


class LogFile(logging.Handler):
    """train.log, or another file of log lines.

    Args:
        path: in an existing folder.
        logger: says what is lost.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        super().__init__()
        self._lines = Appender(path.open("ab", buffering=0), "the log file", logger)

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return self._lines.lost

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of `record`, or count it."""
        try:
            line = self.format(record)
        except Exception:  # whatever a wrong call of the logger raises; logging's own handlers do the same
            self.handleError(record)
            return
        self._lines.append(line, lambda missing: f"({missing} lines could not be written here)")

    def close(self) -> None:
        """Close the file."""
        self._lines.file.close()
        super().close()
