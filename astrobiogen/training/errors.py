"""Errors that a command reports in one line instead of a traceback."""

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
    """Too many updates in a row with NaN or Inf.

    Args:
        windows: the last of them, with sample numbers, gradient norm and terms of the loss.
    """

    def __init__(self, message: str, windows: list[dict[str, Any]]) -> None:
        super().__init__(message, exit_code=1)
        self.windows = windows
