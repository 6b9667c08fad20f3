"""A packed dataset on disk: reading and verifying it, and the rules by which splits and statistics are derived.

``build`` writes by these rules, ``check`` recomputes them, ``load`` reads; each rule stands here once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import splits
from astrobiogen.data.climates.cubes import VARIABLES, level_statistics
from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.data.spec import DataSpec, Row
from astrobiogen.data.storage.container import Contents, parse_arrays
from astrobiogen.data.storage.guarded import MIB, MOST_UNPACKED, open_inside, read_bounded
from astrobiogen.data.storage.tables import ClimateRow, OrganismRow, PairRow, PartRow, read_rows

MANIFEST = "manifest.json"
FORMAT = "astrobiogen-pack-2"
_MOST_MANIFEST = 64 * MIB
PARTS = "split.csv"
IN_SAMPLE, IN_TABLE, BY_NAME = "sample", "table", "name"  # who placed a star system or genus
STD_FLOOR = 1e-6  # of a constant column: it becomes 0 after centring
CORPUS_VALIDATION_SHARE = 0.1


def latitude_bounds(latitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges [lat + 1] in degrees half way between the latitudes (north first), poles at the ends."""
    return np.concatenate([[90.0], (latitudes[1:] + latitudes[:-1]) / 2.0, [-90.0]])


def level_bounds(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sigma interfaces [lev + 1] from mid points (top first): 0, then each mid point lies in the middle of its layer
    where that is possible.

    ExoPlaSim's mid points are means of its interfaces, so b[k+1] = 2 m[k] - b[k]; rounding is kept in check by ending
    at exactly 1.
    """
    bounds = [0.0]
    for mid in levels:
        bounds.append(2.0 * float(mid) - bounds[-1])
    edges = np.array(bounds)
    halves = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2.0, [1.0]])
    if (np.diff(edges) > 0).all() and abs(edges[-1] - 1.0) < 0.01:
        edges[-1] = 1.0
        return edges
    return halves


def parts_of(
    climates: Sequence[ClimateRow], organisms: Sequence[OrganismRow], placed: Mapping[tuple[str, str], PartRow]
) -> tuple[PartRow, ...]:
    """Part of every star system and genus: as ``placed`` by (kind, name), or by its own name."""
    names = [(splits.STAR_SYSTEM, name) for name in sorted({c.star_system for c in climates})]
    names += [(splits.GENUS, name) for name in sorted({o.genus for o in organisms})]
    return tuple(placed.get(key) or PartRow(*key, splits.part_by_name(*key), BY_NAME) for key in names)


def held_out(parts: Sequence[PartRow]) -> splits.HeldOut:
    """The names that training never sees."""

    def of(kind: str, part: str) -> frozenset[str]:
        return frozenset(row.name for row in parts if (row.kind, row.part) == (kind, part))

    return splits.HeldOut(
        of(splits.STAR_SYSTEM, splits.TEST),
        of(splits.GENUS, splits.TEST),
        of(splits.STAR_SYSTEM, splits.VALIDATION),
        of(splits.GENUS, splits.VALIDATION),
    )


def read_parts(path: Path) -> tuple[PartRow, ...]:
    """Table of parts; an unknown kind or part, or a name listed twice, is a ``DataError``."""
    rows = read_rows(path, PartRow)
    for k, row in enumerate(rows):
        for field, value, known in (("kind", row.kind, splits.KINDS), ("part", row.part, splits.PARTS)):
            if value not in known:
                raise DataError(path, f"line {k + 2}, {field}", f"is {value!r}, expected one of {known}")
    twice = [key for key, times in Counter((row.kind, row.name) for row in rows).items() if times > 1]
    if twice:
        raise DataError(path, twice[0][1], f"the {twice[0][0]} is listed more than once")
    return rows


def corpus_part(module: str) -> str:
    """Part of a corpus module: about a tenth is validation text, by hash of its id."""
    return splits.VALIDATION if splits.unit_hash(f"corpus|{module}") < CORPUS_VALIDATION_SHARE else splits.TRAIN


def cube_statistics(codes: Sequence[Mapping[str, NDArray[np.int16]]]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Mean and standard deviation [V][lev] of decoded cubes."""
    pairs = [level_statistics([c[variable] for c in codes], variable) for variable in VARIABLES]
    return tuple(tuple(m.tolist()) for m, _ in pairs), tuple(tuple(np.maximum(s, 1e-12).tolist()) for _, s in pairs)


def param_statistics(rows: Sequence[ClimateRow]) -> tuple[Row, Row]:
    """Mean and standard deviation [P] over climates, ignoring missing values; 1 for the deviation of a constant or
    absent column.
    """
    table = np.array([row.params for row in rows])
    known = np.isfinite(table)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, table, 0.0).sum(axis=0) / count
    std = np.sqrt((np.where(known, table - mean, 0.0) ** 2).sum(axis=0) / count)
    return tuple(mean.tolist()), tuple(np.where(std > STD_FLOOR, std, 1.0).tolist())


def spectrum_statistics(
    names: Sequence[str], albedo: NDArray[np.float32], paired: Mapping[tuple[str, int], str], fitted_on: Sequence[str]
) -> tuple[float, float]:
    """Mean and standard deviation of the albedo over the unpaired library and the spectra of training planets."""
    hidden = {name for (planet, _), name in paired.items() if planet not in fitted_on}
    seen = np.array([a for name, a in zip(names, albedo, strict=True) if name not in hidden], np.float64)
    if seen.size == 0:
        return 0.0, 1.0
    return float(seen.mean()), float(seen.std())


# Fields of the spec that hold what was measured on the training part, and on which planets.
STATISTICS = ("cube_mean", "cube_std", "param_mean", "param_std", "spectrum_mean", "spectrum_std", "fitted_on")


@dataclass(frozen=True)
class Pack:
    """Tables and spec of a pack folder, with the verified bytes of its files."""

    root: Path
    spec: DataSpec
    climates: tuple[ClimateRow, ...]
    organisms: tuple[OrganismRow, ...]
    pairs: tuple[PairRow, ...]
    parts: tuple[PartRow, ...]
    manifest: dict[str, Any]

    def contents(self, name: str) -> Contents:
        """Decoded container file ``name``, after comparing its SHA-256 with the manifest."""
        return parse_arrays(self.root / name, verified_bytes(self.root, name, self.manifest))


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a pack folder; absent, damaged or of another format is a ``DataError``."""
    path = root / MANIFEST
    try:
        with open_inside(root, MANIFEST) as file:
            manifest = json.loads(read_bounded(file, _MOST_MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(path, "format", f"is {found!r}, expected {FORMAT!r}: build the pack anew")
    if not isinstance(manifest.get("files"), dict):
        raise DataError(path, "files", "is absent or no object")
    return manifest


def verified_bytes(root: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Bytes of file ``name``, checked for presence in folder and manifest, kind, size and SHA-256."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise DataError(root / name, "", "is not listed in the manifest")
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
        raise DataError(root / MANIFEST, name, "lacks 'bytes' or 'sha256'")
    try:
        with open_inside(root, name) as file:
            data = read_bounded(file, MOST_UNPACKED)
    except OSError as error:
        raise unreadable(root / name, error) from error
    if len(data) != entry["bytes"]:
        raise DataError(
            root / name, "size", f"{len(data)} bytes, the manifest says {entry['bytes']}: truncated or changed"
        )
    if (digest := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise DataError(root / name, "sha256", f"{digest[:16]}..., the manifest says {entry['sha256'][:16]}...")
    return data


def open_pack(root: Path) -> Pack:
    """Read manifest, spec and tables of a pack folder, verifying each file that is read.

    Raises:
        DataError: The folder or a file is missing, damaged or inconsistent.
    """
    if not root.is_dir():
        raise DataError(root, "", "dataset folder is missing")
    manifest = read_manifest(root)
    for name in ("spec.json", "climates.csv", "organisms.csv", "pairs.csv", PARTS, "tokenizer.json"):
        verified_bytes(root, name, manifest)
    spec = DataSpec.from_json((root / "spec.json").read_text(encoding="utf-8"), str(root / "spec.json"))
    climates = read_rows(root / "climates.csv", ClimateRow)
    organisms = read_rows(root / "organisms.csv", OrganismRow)
    pairs = read_rows(root / "pairs.csv", PairRow)
    parts = read_parts(root / PARTS)
    known = {(c.planet, c.epoch) for c in climates}, {o.organism for o in organisms}
    for row in pairs:
        if (row.planet, row.epoch) not in known[0] or row.organism not in known[1]:
            raise DataError(
                root / "pairs.csv", f"{row.planet} g{row.epoch} {row.organism}", "names an unknown climate or organism"
            )
        if not 0.0 <= row.fraction <= 1.0 or row.label not in (0, 1):
            raise DataError(
                root / "pairs.csv", f"{row.planet} g{row.epoch} {row.organism}", f"S {row.fraction}, label {row.label}"
            )
    return Pack(root, spec, climates, organisms, pairs, parts, manifest)
