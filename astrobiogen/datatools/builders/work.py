"""State of one build."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates.grids import Grid


@dataclass
class Work:
    """Where from, where to, what was made, and what had to be left out or masked (``problems``)."""

    raw: Path
    output: Path
    workers: int
    problems: list[str] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[str, dict[str, NDArray[np.int16]]] = field(default_factory=dict)
    grid: Grid | None = None

    @contextlib.contextmanager
    def tolerated(self, consequence: str) -> Iterator[None]:
        """A ``DataError`` inside is listed with its consequence and does not end the build."""
        try:
            yield
        except DataError as error:
            self.blame(error, consequence)

    def blame(self, error: DataError, consequence: str) -> None:
        """List a problem, its file relative to the raw folder."""
        self.problems.append(f"{error}: {consequence}".replace(f"{self.raw}/", ""))

    def record(self, packed: str, *raw: Path) -> None:
        """Note the raw files (with SHA-256) from which ``packed`` was made."""
        listed = self.sources.setdefault(packed, [])
        for path in raw:
            listed += [str(path.relative_to(self.raw)), digest(path)]


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder (a Zarr store), that of its files' names and digests in order."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        lines = "".join(f"{p.relative_to(path)} {digest(p)}\n" for p in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()
