"""Labels of random pairs recomputed from the raw files, by none of the packed numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from astrobiogen.data import labels
from astrobiogen.data.climates import cubes
from astrobiogen.data.errors import DataError
from astrobiogen.data.storage.pack import MANIFEST, Pack, latitude_bounds
from astrobiogen.data.storage.tables import PairRow
from astrobiogen.datatools.builders.organisms import FOLDER, TABLE, niche, organism_name, read_table
from astrobiogen.datatools.builders.work import digest
from astrobiogen.datatools.climates import climate, grids
from astrobiogen.datatools.networks import fba
from astrobiogen.datatools.networks.network import read_network
from astrobiogen.datatools.progress import track
from astrobiogen.datatools.workers import map_isolated


@dataclass(frozen=True)
class Growth:
    """Whether a network grows in its published medium, and without O2."""

    anyway: bool
    without_o2: bool


def growth_of(path: Path) -> Growth:
    """Two flux-balance answers of one raw network."""
    network = read_network(path)
    mu, closed = fba.growth(network), fba.growth(network, ("o2",))
    return Growth(mu > fba.GROWTH_THRESHOLD, closed > fba.GROWTH_THRESHOLD)


def raw_file(pack: Pack, raw: Path, packed: str) -> Path:
    """The raw file from which ``packed`` was made, its SHA-256 compared with the manifest's."""
    sources = pack.manifest["files"].get(packed, {}).get("sources") or []
    if len(sources) < 2:
        raise DataError(pack.root / MANIFEST, packed, "names no raw file that it was made from")
    name, expected = sources[:2]
    path = raw / name
    if not path.exists():
        raise DataError(path, "", f"is missing; {packed} was made from it")
    if (found := digest(path)) != expected:
        raise DataError(path, "sha256", f"{found[:16]}..., {packed} was made from {expected[:16]}...")
    return path


def _fraction(pack: Pack, raw: Path, pair: PairRow, row: dict[str, str], growth: Growth) -> float:
    """S of one pair from its raw climate, the raw table of organisms and the network's answers."""
    place = next(c for c in pack.climates if (c.planet, c.epoch) == (pair.planet, pair.epoch))
    path = raw_file(pack, raw, place.surface_file)
    later = climate.read_climate(path, ("ts", "sic"), grids.standard_grid())
    weights = labels.latitude_weights(latitude_bounds(later.grid.latitudes))
    low, high, _ = niche(raw / TABLE, row)
    # S is defined on fields in these steps (docs/data.md), whatever precision a raw file has
    ts = cubes.quantise_ts(later.fields["ts"]) * cubes.TS_STEP
    sic = cubes.quantise_sic(later.fields["sic"]) * cubes.SIC_STEP
    share = labels.niche_fraction(ts, sic, weights, low, high)
    return share * labels.gate(growth.anyway, growth.without_o2, float(later.parameters.get("pO2", 0.0)))


def recomputed(pack: Pack, raw: Path, count: int, seed: int, workers: int = 2) -> list[str]:
    """Problems among ``count`` pairs drawn with ``seed``: a raw file that is missing or changed, an S that is not
    exactly the packed one, or another class. Empty when all agree.
    """
    order = np.random.default_rng(seed).permutation(len(pack.pairs))[:count]
    pairs = [pack.pairs[i] for i in order]
    table = {organism_name(row["file_gz"]): row for row in read_table(raw / TABLE)}
    names = sorted({p.organism for p in pairs})
    problems: list[str] = []
    if absent := [n for n in names if n not in table]:
        return [str(DataError(raw / TABLE, absent[0], "no row of this organism"))]
    paths = [raw / FOLDER / table[n]["file_gz"] for n in names]
    answers = track(map_isolated(growth_of, paths, workers), "networks", len(paths))
    growth = dict(zip(names, answers, strict=True))
    for pair in pairs:
        answer = growth[pair.organism]
        try:
            if isinstance(answer, DataError):
                raise answer
            s = _fraction(pack, raw, pair, table[pair.organism], answer)
        except DataError as error:
            problems.append(str(error))
            continue
        if s != pair.fraction or int(s >= pack.spec.class_threshold) != pair.label:
            where = f"{pair.planet} g{pair.epoch} {pair.organism}"
            problems.append(f"labels: {where}: S {pair.fraction!r}, from the raw files {s!r}")
    return list(dict.fromkeys(problems))
