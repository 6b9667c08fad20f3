"""The exception type of the data layer, and the words for a file that cannot be read."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A file or field of a dataset is missing, damaged or outside what is documented.

    Args:
        source: File (or object) at fault.
        field: Field, variable or element inside it; empty when the whole file is at fault.
        problem: What was found and what was expected.
    """

    def __init__(self, source: str | Path, field: str, problem: str) -> None:
        self.source = str(source)
        self.field = field
        self.problem = problem
        where = f"{self.source} [{field}]" if field else self.source
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        """Pickle by the three parts, so that the error crosses from a worker process unchanged."""
        return DataError, (self.source, self.field, self.problem)


def unreadable(path: str | Path, error: Exception) -> DataError:
    """What to raise when ``path`` cannot be opened, decompressed or decoded."""
    if isinstance(error, FileNotFoundError):
        return DataError(path, "", "is missing")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(path, "", f"cannot be read ({reason})")
