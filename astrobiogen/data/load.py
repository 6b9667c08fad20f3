"""A pack folder to a ``DatasetBundle``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from astrobiogen.data import splits
from astrobiogen.data.climates.cubes import check_header, read_codes, standardised
from astrobiogen.data.dataset import DatasetBundle, HabitatDataset, OrganismEntry, PairEntry, PlanetEntry, Store
from astrobiogen.data.errors import DataError
from astrobiogen.data.networks.graphs import unpack_graph
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage.lazy import MIB, CubeCache, LazyEpochs
from astrobiogen.data.storage.pack import Pack, open_pack, verified_bytes
from astrobiogen.data.storage.tables import ClimateRow, OrganismRow
from astrobiogen.data.text import TextEncoder, load_tokenizer, tokenizer_of

SAMPLE_FOLDER = Path(__file__).parent / "sample"
# of a pack and of a model that reads it: what they must share
_AXES = (
    "variables", "units", "levels", "latitudes", "longitudes", "months", "planet_param_names", "planet_param_units",
    "wavelengths", "node_features", "edge_features", "laplacian_dim", "random_walk_dim", "class_threshold",
)  # fmt: skip
_THREADS = 2  # LZMA and numpy release the GIL
CACHE_MIB = 256.0


def _key(planet: str, epoch: int) -> str:
    return f"{planet}_g{epoch}"


def _shape(spec: DataSpec) -> tuple[int, int, int, int]:
    return spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes)


def read_cube(pack: Pack, name: str) -> Tensor:
    """Standardised cube float32 [V, T, lev, lat, lon] of the packed file ``name``, its digest and values checked."""
    codes = read_codes(pack.contents(name), _shape(pack.spec))
    return standardised(codes, np.array(pack.spec.cube_mean), np.array(pack.spec.cube_std))


def stored_digest(pack: Pack, name: str) -> str:
    """SHA-256 of the packed file ``name`` by the manifest, with which every reading of it compares."""
    return str(pack.manifest["files"][name]["sha256"])


def _params(row: ClimateRow, spec: DataSpec, source: Path) -> tuple[Tensor, Tensor]:
    if len(row.params) != spec.n_planet_params:
        raise DataError(
            source, f"{row.planet} g{row.epoch} params", f"{len(row.params)} values, expected {spec.n_planet_params}"
        )
    raw = torch.tensor(row.params, dtype=torch.float64)
    mask = torch.isfinite(raw)
    scaled = (raw - torch.tensor(spec.param_mean, dtype=torch.float64)) / torch.tensor(
        spec.param_std, dtype=torch.float64
    )
    return torch.where(mask, scaled, 0.0).float(), mask


def _spectra(pack: Pack) -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised spectrum [W, 2] and mask [W] of the library, by name."""
    spec, contents = pack.spec, pack.contents("spectra.bin")
    names = contents.attributes["names"]
    w = spec.n_wavelengths
    albedo = contents.get("albedo", (len(names), w), "float32")
    mask = contents.get("mask", (len(names), w), "bool")
    if not np.isfinite(albedo).all():
        raise DataError(contents.path, "albedo", "holds non-finite values")
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for k, name in enumerate(names):
        known = torch.from_numpy(mask[k])
        scaled = (torch.from_numpy(albedo[k]) - spec.spectrum_mean) / spec.spectrum_std
        out[name] = torch.stack([wave, torch.where(known, scaled, 0.0)], dim=1), known
    return out


def _planets(pack: Pack, cubes: CubeCache, library: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, PlanetEntry]:
    spec, paired = pack.spec, pack.contents("spectra.bin").attributes["paired"]
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    absent = torch.stack([wave, torch.zeros_like(wave)], dim=1), torch.zeros(spec.n_wavelengths, dtype=torch.bool)
    files = {_key(row.planet, row.epoch): row.cube_file for row in pack.climates}
    out: dict[str, PlanetEntry] = {}
    for row in pack.climates:
        key = _key(row.planet, row.epoch)
        params, mask = _params(row, spec, pack.root / "climates.csv")
        history = [files.get(_key(row.planet, row.epoch - back)) for back in range(spec.n_epochs - 1, -1, -1)]
        epochs = LazyEpochs(history, cubes)
        spectrum, spectrum_mask = library[paired[key]] if key in paired else absent
        metadata = {"planet": row.planet, "star_system": row.star_system, "epoch": row.epoch, "climate": key}
        out[key] = PlanetEntry(row.run_id, params, mask, epochs, spectrum, spectrum_mask, row.text, metadata)
    return out


def _organism(pack: Pack, row: OrganismRow) -> OrganismEntry:
    graph = unpack_graph(pack.contents(row.graph_file))
    metadata = {"organism": row.organism, "species": row.species, "genus": row.genus}
    return OrganismEntry(graph, row.text, metadata, (graph, stored_digest(pack, row.graph_file)))


def _accepted(pack: Pack, max_toa_imbalance: float | None, max_ts_drift: float | None) -> Pack:
    """The pack without climates (and their pairs) beyond the limits; an unknown figure fails a limit."""

    def good(row: ClimateRow) -> bool:
        figures = ((row.toa_imbalance_label, max_toa_imbalance), (row.ts_drift, max_ts_drift))
        return all(limit is None or abs(value) <= limit for value, limit in figures)  # NaN compares false

    climates = tuple(row for row in pack.climates if good(row))
    if not climates:
        limits = f"|TOA| <= {max_toa_imbalance} W/m2, |drift| <= {max_ts_drift} K"
        raise DataError(pack.root / "climates.csv", "acceptance", f"no climate is within {limits}")
    kept = {(row.planet, row.epoch) for row in climates}
    pairs = tuple(pair for pair in pack.pairs if (pair.planet, pair.epoch) in kept)
    return dataclasses.replace(pack, climates=climates, pairs=pairs)


def _read_as(pack: Pack, statistics: Mapping[str, Any]) -> tuple[Pack, Tokenizer]:
    """The pack with the spec of ``statistics`` (``DatasetBundle.statistics``) in place of its own, and its tokenizer;
    axes, units or names that are not the pack's are a ``DataError``.
    """
    for name in ("spec", "tokenizer"):
        if name not in statistics:
            raise DataError("statistics", name, f"missing; there are {sorted(statistics)}")
    spec = DataSpec.from_json(json.dumps(statistics["spec"]), "statistics")
    for name in _AXES:
        own, other = getattr(pack.spec, name), getattr(spec, name)
        numbers = isinstance(own, tuple) and own and isinstance(own[0], float)
        if not (len(own) == len(other) and np.allclose(own, other, rtol=1e-6) if numbers else own == other):
            raise DataError(pack.root / "spec.json", name, f"is {own}, the model was trained on {other}")
    return dataclasses.replace(pack, spec=spec), tokenizer_of(json.dumps(statistics["tokenizer"]), "statistics")


def load(
    path: str | Path,
    max_toa_imbalance: float | None = None,
    max_ts_drift: float | None = None,
    cache_mib: float = CACHE_MIB,
    statistics: Mapping[str, Any] | None = None,
) -> DatasetBundle:
    """Load and verify a packed dataset; climates are read when a sample is used.

    At once: every file is compared with its SHA-256; tables, networks, texts and spectra are read and checked; of each
    climate the header (segment, variables, shape, dtype, units). A climate's values, one packed file per (planet,
    epoch), are decoded and checked (range, empty levels) at first use, 17 ms each, and kept in a least-recently-used
    cache of at most ``cache_mib``.

    Args:
        path: Folder of the pack.
        max_toa_imbalance: W/m2; leave out climates whose label segment is further from balance. None: keep all.
        max_ts_drift: K; leave out climates whose mean surface temperature moved more between the segments. None: keep
            all. A climate that is left out is also masked in the history of its planet's later epochs.
        cache_mib: MiB of decoded climates that a process holds, >= 0. A climate of the bundled size takes 1.9; all 45
            bundled ones fit into the default of 256.
        statistics: Means, deviations and tokenizer of the data that a model was trained on
            (``DatasetBundle.statistics``, kept with every trained model), to be used in place of the pack's own: what
            the model sees then means the same.

    Raises:
        DataError: A file is missing, truncated, changed or out of range (names file and field), no climate is accepted,
            or the axes of ``statistics`` are not the pack's. From a sample: its climate's values are out of range, or
            its file has changed since.
        ValueError: ``cache_mib`` is negative.
    """
    if not cache_mib >= 0:
        raise ValueError(f"cache_mib is {cache_mib}, expected at least 0")
    pack = _accepted(open_pack(Path(path)), max_toa_imbalance, max_ts_drift)
    tokenizer = load_tokenizer(pack.root / "tokenizer.json")
    if statistics is not None:
        pack, tokenizer = _read_as(pack, statistics)
    for name in pack.manifest["files"]:  # all digests first (0.02 s): a damaged file is named before anything else
        verified_bytes(pack.root, name, pack.manifest)
    for row in pack.climates:
        check_header(pack.contents(row.cube_file), _shape(pack.spec))
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda row: _organism(pack, row), pack.organisms))
    organisms = {row.organism: entry for row, entry in zip(pack.organisms, entries, strict=True)}
    read, stored = functools.partial(read_cube, pack), functools.partial(stored_digest, pack)
    cubes = CubeCache(read, int(cache_mib * MIB), stored)
    library = _spectra(pack)
    planets = _planets(pack, cubes, library)
    encoder = TextEncoder(tokenizer, pack.spec.max_text_tokens)
    tokens = encoder.encode_pairs(
        {k: p.text for k, p in planets.items()}, {k: o.text for k, o in organisms.items()}, str(pack.root)
    )
    return _bundle(pack, Store(pack.spec, planets, organisms, tokens, cubes, library))


def _bundle(pack: Pack, store: Store) -> DatasetBundle:
    cells: dict[str, list[PairEntry]] = {cell: [] for cell in splits.CELLS}
    for row in pack.pairs:
        if row.cell not in cells:
            raise DataError(pack.root / "pairs.csv", "cell", f"{row.cell!r}, expected one of {splits.CELLS}")
        cells[row.cell].append(PairEntry(_key(row.planet, row.epoch), row.organism, row.fraction, row.label, row.cell))
    sets = {cell: HabitatDataset(store, pairs, cell) for cell, pairs in cells.items()}
    test = {cell: sets[cell] for cell in splits.TEST_CELLS}
    return DatasetBundle(
        sets[splits.TRAIN], sets[splits.VALIDATION], test, pack.spec, {"root": str(pack.root), **pack.manifest}
    )


def load_bundled() -> DatasetBundle:
    """The real dataset inside the package: 45 climates, the metabolic networks that have a growth range and grow,
    texts and spectra.
    """
    return load(SAMPLE_FOLDER)
