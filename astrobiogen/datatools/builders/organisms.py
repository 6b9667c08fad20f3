"""Raw metabolic networks to packed graphs and table rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from astrobiogen.data import labels
from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.data.storage.container import write_arrays
from astrobiogen.data.storage.tables import OrganismRow
from astrobiogen.datatools.builders import text
from astrobiogen.datatools.builders.work import Work
from astrobiogen.datatools.networks import fba
from astrobiogen.datatools.networks.network import PackedNetwork, pack_network
from astrobiogen.datatools.progress import track
from astrobiogen.datatools.workers import map_isolated

TABLE, FOLDER = "metabolic/organisms.csv", "metabolic/sbml"
_COLUMNS = ("file_gz", "species", "domain", "ogt_c", "corkrey_obs", "corkrey_tmin", "corkrey_tmax")
_COLDEST, _HOTTEST = -50.0, 150.0  # of any life, in degrees C: kelvins lie outside
SUFFIXES = (".gz", ".xml", ".sbml", ".json")


def _number(path: Path, row: dict[str, str], column: str) -> float:
    value = row.get(column) or ""
    try:
        number = float(value) if value else math.nan
    except ValueError as error:
        raise DataError(path, f"{row['file_gz']}, {column}", f"is {value!r}, expected a number") from error
    if math.isinf(number):
        raise DataError(path, f"{row['file_gz']}, {column}", f"is {value!r}, expected a finite number")
    return number


def niche(path: Path, row: dict[str, str]) -> tuple[float, float, str]:
    """Growth range (low, high) in degrees C of a row of the table, and its source.

    Raises:
        DataError: A value that is no number, or an organism without a known growth range.
    """
    ogt, observed, tmin, tmax = (_number(path, row, c) for c in _COLUMNS[3:])
    for column, value in (("ogt_c", ogt), ("corkrey_tmin", tmin), ("corkrey_tmax", tmax)):
        if not math.isnan(value) and not _COLDEST <= value <= _HOTTEST:
            text = f"is {value:g}, expected {_COLDEST:g} to {_HOTTEST:g} degrees C"
            raise DataError(path, f"{row['file_gz']}, {column}", text)
    count = 0 if math.isnan(observed) else int(observed)
    found = labels.growth_range(ogt, count, tmin, tmax)
    if found is None:
        raise DataError(path, row["file_gz"], f"{row['species']} has no known growth range")
    measured = count >= labels.MIN_GROWTH_OBSERVATIONS and tmax > tmin
    return *found, "Corkrey 2016" if measured else "Engqvist 2018 -22/+8"


def organism_name(file: str) -> str:
    """File name without its suffixes."""
    name = file
    while name.endswith(SUFFIXES):
        name = name[: name.rindex(".")]
    return name


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of ``organisms.csv`` in the order of their files.

    Raises:
        DataError: Unreadable, a column absent (an error page saved as CSV has none of them), or no rows.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            if missing := [c for c in _COLUMNS if c not in (reader.fieldnames or ())]:
                raise DataError(path, missing[0], f"column absent; the header is {(reader.fieldnames or [])[:6]}")
            rows = sorted(reader, key=lambda row: row["file_gz"] or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, error) from error
    if not rows:
        raise DataError(path, "", "the table is empty")
    return rows


def complete(work: Work, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that name a file, a species and a domain; the others are left out."""
    kept: list[dict[str, str]] = []
    for k, row in enumerate(rows):
        with work.tolerated("organism left out"):
            if empty := [c for c in _COLUMNS[:3] if not (row[c] or "").strip()]:
                where = row["file_gz"] or f"row {k + 1} by file name"
                raise DataError(work.raw / TABLE, where, f"says nothing in {', '.join(empty)}")
            if Path(row["file_gz"]).name != row["file_gz"] or row["file_gz"] in (".", ".."):
                raise DataError(work.raw / TABLE, row["file_gz"], f"is no name of a file in {FOLDER}")
            kept.append(row)
    return kept


def _row(work: Work, row: dict[str, str], made: PackedNetwork, note: str) -> OrganismRow:
    path = work.raw / FOLDER / row["file_gz"]
    low, high, source = niche(work.raw / TABLE, row)
    if made.growth <= fba.GROWTH_THRESHOLD:
        raise DataError(path, "objective", f"the model of {row['species']} does not grow in its published medium")
    organism = organism_name(row["file_gz"])
    packed = f"metabolic/{organism}.bin"
    if (work.output / packed).exists():
        raise DataError(path, "", f"{organism} was made from another file already")
    write_arrays(work.output / packed, made.arrays, {"organism": organism})
    work.record(packed, path)
    flags = [int(mu > fba.GROWTH_THRESHOLD) for mu in (made.growth, made.growth_without_o2, made.growth_without_o2_h2)]
    return OrganismRow(
        organism=organism,
        species=row["species"],
        genus=row["species"].split()[0],
        domain=row["domain"],
        niche_low=low,
        niche_high=high,
        niche_source=source,
        grows=flags[0],
        grows_without_o2=flags[1],
        grows_without_o2_h2=flags[2],
        metabolites=made.metabolites,
        reactions=made.reactions,
        edges=made.edges,
        graph_file=packed,
        text=note,
    )


def read_notes(work: Work) -> dict[str, dict[str, str]]:
    path = work.raw / "text/organism_notes.jsonl.gz"
    found: dict[str, dict[str, str]] = {}
    with work.tolerated("notes of organisms are masked"):
        for row in text.read_jsonl(path, ("biomodels_id", "species", "name", "text")):
            found[row["biomodels_id"]] = row
    return found


def build_networks(work: Work) -> list[OrganismRow]:
    """Pack every network whose organism has a growth range and whose model grows; files are read in worker processes,
    and one that is bad, or ends its process, costs its organism.
    """
    table = complete(work, read_table(work.raw / TABLE))
    notes = read_notes(work)
    everyone = sorted({row["species"] for row in table})
    paths = [work.raw / FOLDER / row["file_gz"] for row in table]
    results: Iterator[PackedNetwork | DataError] = map_isolated(pack_network, paths, work.workers)
    done: list[OrganismRow] = []
    pairs = track(zip(table, results, strict=True), "networks", len(table), lambda pair: pair[0]["file_gz"])
    for row, made in pairs:
        note = notes.get(row.get("biomodels_id") or organism_name(row["file_gz"]))
        clean = text.organism_note(note["text"], note["name"], row["species"], everyone) if note else ""
        with work.tolerated("organism left out"):
            if isinstance(made, DataError):
                raise made
            done.append(_row(work, row, made, clean))
    return done
