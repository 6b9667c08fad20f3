"""Errors that a command reports in one line instead of a traceback."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something the user can put right: a wrong value, a missing folder, a corrupt file.

    Args:
        message: what was found, what was expected and what to do, in one line.
        exit_code: 2 for wrong input (the convention of command lines), 1 for a failure during the run.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not match its checksums."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=1)


class NumericalError(UserError):
    """NaN or Inf where a run cannot go on with it.

    Args:
        windows: the last skipped updates, with sample numbers, gradient norm and terms of the loss.
        details: what else the report shall hold, JSON data.
    """

    def __init__(self, message: str, windows: Sequence[dict[str, Any]] = (), **details: Any) -> None:
        super().__init__(message, exit_code=1)
        self.windows = list(windows)
        self.details = details
