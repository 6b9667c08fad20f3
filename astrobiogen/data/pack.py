"""A packed dataset on disk: reading and verifying it, and the rules by which splits and statistics are derived.

``build`` writes by these rules, ``check`` recomputes them, ``load`` reads; each rule stands here once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import splits
from astrobiogen.data.container import Contents, parse_arrays
from astrobiogen.data.cubes import VARIABLES, level_statistics
from astrobiogen.data.errors import DataError
from astrobiogen.data.spec import DataSpec, Row
from astrobiogen.data.tables import ClimateRow, OrganismRow, PairRow, read_rows

MANIFEST = "manifest.json"
FORMAT = "astrobiogen-pack-1"
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


def held_out(climates: Sequence[ClimateRow], organisms: Sequence[OrganismRow]) -> splits.HeldOut:
    """Names held out by ``splits.hold_out``: star systems in the order of their mean stellar flux, genera in the order
    of the mean middle of their growth ranges.
    """
    flux: dict[str, list[float]] = {}
    middle: dict[str, list[float]] = {}
    for row in climates:
        flux.setdefault(row.star_system, []).append(row.params[0])
    for organism in organisms:
        middle.setdefault(organism.genus, []).append((organism.niche_low + organism.niche_high) / 2.0)
    systems = [(float(np.mean(v)), name) for name, v in flux.items()]
    genera = [(float(np.mean(v)), name) for name, v in middle.items()]
    return splits.hold_out(systems, genera)


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


@dataclass(frozen=True)
class Pack:
    """Tables and spec of a pack folder, with the verified bytes of its files."""

    root: Path
    spec: DataSpec
    climates: tuple[ClimateRow, ...]
    organisms: tuple[OrganismRow, ...]
    pairs: tuple[PairRow, ...]
    manifest: dict[str, Any]

    def contents(self, name: str) -> Contents:
        """Decoded container file ``name``, after comparing its SHA-256 with the manifest."""
        return parse_arrays(self.root / name, verified_bytes(self.root, name, self.manifest))


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a pack folder; absent, damaged or of another format is a ``DataError``."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(path, "", f"cannot be read ({error})") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise DataError(path, "format", f"is not a manifest of {FORMAT}")
    return manifest


def verified_bytes(root: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Bytes of file ``name``, checked for presence in folder and manifest, size and SHA-256."""
    entry = manifest["files"].get(name)
    if entry is None:
        raise DataError(root / name, "", "is not listed in the manifest")
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise DataError(root / name, "", f"cannot be read ({error.strerror})") from error
    if len(data) != entry["bytes"]:
        raise DataError(
            root / name, "size", f"{len(data)} bytes, the manifest says {entry['bytes']}: truncated or changed"
        )
    if (digest := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise DataError(root / name, "sha256", f"{digest[:16]}..., the manifest says {entry['sha256'][:16]}...")
    return data


def open_pack(root: Path) -> Pack:
    """Read manifest, spec and tables of a pack folder, verifying each file that is read.

    Raises
    ------
    DataError
        The folder or a file is missing, damaged or inconsistent.
    """
    if not root.is_dir():
        raise DataError(root, "", "dataset folder is missing")
    manifest = read_manifest(root)
    for name in ("spec.json", "climates.csv", "organisms.csv", "pairs.csv", "tokenizer.json"):
        verified_bytes(root, name, manifest)
    spec = DataSpec.from_json((root / "spec.json").read_text(encoding="utf-8"), str(root / "spec.json"))
    climates = read_rows(root / "climates.csv", ClimateRow)
    organisms = read_rows(root / "organisms.csv", OrganismRow)
    pairs = read_rows(root / "pairs.csv", PairRow)
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
    return Pack(root, spec, climates, organisms, pairs, manifest)
