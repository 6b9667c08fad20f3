"""Typed rows of the packed CSV tables."""

from __future__ import annotations

import csv
import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from astrobiogen.data.errors import DataError, unreadable


@dataclass(frozen=True)
class ClimateRow:
    """One climate (planet, epoch): file names relative to the pack, acceptance figures, parameters in the units of the
    spec (NaN: not measured).
    """

    run_id: int
    planet: str
    catalogue_name: str
    star_system: str
    epoch: int
    setting: str
    cube_file: str
    surface_file: str
    toa_imbalance_input: float  # W/m2, mean of the input segment
    toa_imbalance_label: float
    lowest_ta_input: float  # K, unweighted mean of the lowest level: a fingerprint of the segment
    ts_input: float  # K, area mean of the surface temperature in the input segment
    ts_label: float  # the same in the label segment
    params: tuple[float, ...]
    text: str

    @property
    def ts_drift(self) -> float:
        """K, change of the mean surface temperature from the input to the label segment; NaN when unknown."""
        return self.ts_label - self.ts_input


@dataclass(frozen=True)
class OrganismRow:
    """One metabolic network with its organism's growth range [degrees C] and flux-balance answers."""

    organism: str
    species: str
    genus: str
    domain: str
    niche_low: float
    niche_high: float
    niche_source: str
    grows: int
    grows_without_o2: int
    grows_without_o2_h2: int
    metabolites: int
    reactions: int
    edges: int
    graph_file: str
    text: str


@dataclass(frozen=True)
class PairRow:
    """One sample: climate, organism, target S, its factors and its split cell."""

    planet: str
    epoch: int
    organism: str
    fraction: float
    niche_fraction: float
    gate: float
    label: int
    cell: str


@dataclass(frozen=True)
class PartRow:
    """Part of one star system or genus: train, validation or test; and who placed it there."""

    kind: str
    name: str
    part: str
    source: str = "table"  # "sample": as in the bundled sample; "table": a table of the raw files; "name": by its hash


Row = TypeVar("Row", ClimateRow, OrganismRow, PairRow, PartRow)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_text(v) for v in value)
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return str(value)


def write_rows(path: Path, rows: Iterable[Row], kind: type[Row]) -> None:
    """Write a table with the dataclass fields as header; floats by ``repr`` (exact), NaN empty inside a row, ``nan``
    inside a tuple.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([" ".join(map(repr, v)) if isinstance(v, tuple) else _text(v) for v in values])


def _value(path: Path, where: str, hint: Any, text: str) -> Any:
    try:
        if isinstance(hint, types.GenericAlias):
            return tuple(float(part) for part in text.split())
        if hint is float:
            return float(text) if text else math.nan
        return hint(text)
    except ValueError as error:
        raise DataError(path, where, f"is {text!r}, expected {hint}") from error


def read_rows(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    """Read a table; a missing file or column (without default), a broken number or an empty table is a ``DataError``
    that names line and column.
    """
    hints = typing.get_type_hints(kind)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            names = reader.fieldnames or ()
            if missing := [name for name in needed if name not in names]:
                raise DataError(path, missing[0], f"column absent; the header is {reader.fieldnames}")
            rows = tuple(
                kind(
                    **{
                        name: _value(path, f"line {k + 2}, {name}", hint, line[name] or "")
                        for name, hint in hints.items()
                        if name in names
                    }
                )
                for k, line in enumerate(reader)
            )
    except OSError as error:
        raise unreadable(path, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, "", f"is no table ({error})") from error
    if not rows:
        raise DataError(path, "", "the table is empty")
    return rows
