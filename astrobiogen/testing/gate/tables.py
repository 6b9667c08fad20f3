"""Tables of frozen dataclasses as CSV, one row per object, with the fields' names as header."""

import csv
import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def load(path: Path, kind: type[Record]) -> list[Record]:
    """Rows of a table; none if the file does not exist."""
    if not path.exists():
        return []
    types = typing.get_type_hints(kind)
    with path.open(newline="") as file:
        return [kind(**{name: types[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def save(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """Write a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
