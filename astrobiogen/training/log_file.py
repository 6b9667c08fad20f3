"""train.log: each line reaches the operating system at once, or is counted as lost."""

import logging
from pathlib import Path


class LogFile(logging.Handler):
    """Appends lines to a file. On a full disk lines are lost, not the run: it is said once, on the console, and a line
    with their number follows as soon as there is room.

    Args:
        path: in an existing folder.
        logger: says what is lost.

    Raises:
        OSError: the file cannot be opened.

    Attributes:
        lost: lines that could not be written.
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        super().__init__()
        self._file = path.open("ab", buffering=0)
        self._logger = logger
        self._torn = False
        self._missing = 0
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of `record`, or count it."""
        try:
            line = self.format(record)
        except Exception:  # whatever a wrong call of the logger raises; logging's own handlers do the same
            self.handleError(record)
            return
        head = ["", ""] if self._torn else [""]
        if self._missing:
            head[-1:] = [f"({self._missing} lines could not be written here)", ""]
        data = ("\n".join(head) + line + "\n").encode(errors="backslashreplace")
        try:
            written = self._file.write(data)
            reason = "the disk is full"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written == len(data):
            self._torn, self._missing = False, 0
            return
        self._torn = self._torn or written > 0
        self.lost += 1
        self._missing += 1
        if self._missing == 1:
            self._logger.error("the log file cannot be written (%s); training goes on without it", reason)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
