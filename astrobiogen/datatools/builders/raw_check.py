"""What a build would leave out or mask of a folder of raw files, and why, without building."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from astrobiogen.data.errors import DataError
from astrobiogen.data.storage import pack
from astrobiogen.datatools.builders import organisms, spectra
from astrobiogen.datatools.builders.climates import climate_files, read_raw, read_tables
from astrobiogen.datatools.builders.work import Work
from astrobiogen.datatools.networks.assemble import NONE
from astrobiogen.datatools.networks.network import read_network
from astrobiogen.datatools.progress import track
from astrobiogen.datatools.workers import map_isolated


@dataclass(frozen=True)
class RawReport:
    """How many climates and networks can be used, and what is wrong with the rest."""

    climates: int
    networks: int
    problems: list[str]


def require_objective(path: Path) -> None:
    """Read a network and refuse one that does not say what growth is; runs in worker processes."""
    if read_network(path).objective_source == NONE:
        raise DataError(path, "objective", "absent, and no reaction is called biomass or growth")


def inspect(raw: Path, workers: int = 2) -> RawReport:
    """Read every raw file as ``build`` does, and write nothing. Growth is not computed: a network that does not grow is
    found by the build only.

    Raises:
        DataError: ``raw`` has no folder of climates.
    """
    if not (raw / "climate").is_dir():
        raise DataError(raw, "climate", "folder absent; lay raw files out as docs/data.md describes")
    work = Work(raw, raw, workers)  # nothing is written
    own = raw / "tables" / pack.PARTS
    if own.exists():
        with work.tolerated("the build would refuse"):
            pack.read_parts(own)
    return RawReport(_climates(work), _networks(work), _spectra(work))


def _climates(work: Work) -> int:
    tables, seen = read_tables(work), set()
    files = climate_files(work.raw)
    for path in track(files, "climates", len(files), lambda p: p.name):
        with work.tolerated("climate left out"):
            found = read_raw(work, path, tables)
            if (found.planet, found.epoch) in seen:
                raise DataError(path, "", f"{found.planet} g{found.epoch} is another file's already")
            seen.add((found.planet, found.epoch))
    return len(seen)


def _networks(work: Work) -> int:
    rows: list[dict[str, str]] = []
    with work.tolerated("no organism at all"):
        rows = organisms.complete(work, organisms.read_table(work.raw / organisms.TABLE))
    organisms.read_notes(work)
    paths = [work.raw / organisms.FOLDER / row["file_gz"] for row in rows]
    results = zip(rows, map_isolated(require_objective, paths, work.workers), strict=True)
    good = 0
    for row, answer in track(results, "networks", len(rows), lambda item: item[0]["file_gz"]):
        with work.tolerated("organism left out"):
            if isinstance(answer, DataError):
                raise answer
            organisms.niche(work.raw / organisms.TABLE, row)
            good += 1
    return good


def _spectra(work: Work) -> list[str]:
    """Every problem, those of the spectra of climates the last."""
    for path in sorted((work.raw / "spectra/psg").glob("*_g?.txt")):
        with work.tolerated("spectrum left out"):
            spectra.read_psg(path)
    return work.problems
