"""A pack folder to a ``DatasetBundle``."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from astrobiogen.data import splits
from astrobiogen.data.cubes import read_codes, standardised
from astrobiogen.data.dataset import DatasetBundle, HabitatDataset, OrganismEntry, PairEntry, PlanetEntry, Store
from astrobiogen.data.errors import DataError
from astrobiogen.data.graphs import unpack_graph
from astrobiogen.data.pack import Pack, open_pack, verified_bytes
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.tables import ClimateRow, OrganismRow
from astrobiogen.data.text import TextEncoder, load_tokenizer

SAMPLE_FOLDER = Path(__file__).parent / "sample"
_THREADS = 2  # LZMA and numpy release the GIL; two threads cut the load from 1.9 to 1.2 s on two cores


def _key(planet: str, epoch: int) -> str:
    return f"{planet}_g{epoch}"


def _cube(pack: Pack, row: ClimateRow) -> Tensor:
    spec = pack.spec
    shape = (spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes))
    codes = read_codes(pack.contents(row.cube_file), shape)
    return standardised(codes, np.array(spec.cube_mean), np.array(spec.cube_std))


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
    """Standardised spectrum [W, 2] and mask [W] by climate key, and by ``library:<name>`` for the unpaired ones."""
    spec, contents = pack.spec, pack.contents("spectra.bin")
    names = contents.attributes["names"]
    w = spec.n_wavelengths
    albedo = contents.get("albedo", (len(names), w), "float32")
    mask = contents.get("mask", (len(names), w), "bool")
    if not np.isfinite(albedo).all():
        raise DataError(contents.path, "albedo", "holds non-finite values")
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    out: dict[str, tuple[Tensor, Tensor]] = {}
    paired = contents.attributes["paired"]
    for k, name in enumerate(names):
        known = torch.from_numpy(mask[k])
        scaled = (torch.from_numpy(albedo[k]) - spec.spectrum_mean) / spec.spectrum_std
        entry = torch.stack([wave, torch.where(known, scaled, 0.0)], dim=1), known
        out[f"library:{name}"] = entry
        out.update({key: entry for key, used in paired.items() if used == name})
    return out


def _planets(pack: Pack, cubes: dict[str, Tensor]) -> dict[str, PlanetEntry]:
    spec, spectra = pack.spec, _spectra(pack)
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    absent = torch.stack([wave, torch.zeros_like(wave)], dim=1), torch.zeros(spec.n_wavelengths, dtype=torch.bool)
    out: dict[str, PlanetEntry] = {}
    for row in pack.climates:
        key = _key(row.planet, row.epoch)
        params, mask = _params(row, spec, pack.root / "climates.csv")
        history = [cubes.get(_key(row.planet, row.epoch - back)) for back in range(spec.n_epochs - 1, -1, -1)]
        spectrum, spectrum_mask = spectra.get(key, absent)
        metadata = {"planet": row.planet, "star_system": row.star_system, "epoch": row.epoch, "climate": key}
        out[key] = PlanetEntry(row.run_id, params, mask, tuple(history), spectrum, spectrum_mask, row.text, metadata)
    return out


def _organism(pack: Pack, row: OrganismRow) -> OrganismEntry:
    graph = unpack_graph(pack.contents(row.graph_file))
    return OrganismEntry(graph, row.text, {"organism": row.organism, "species": row.species, "genus": row.genus})


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


def load(path: str | Path, max_toa_imbalance: float | None = None, max_ts_drift: float | None = None) -> DatasetBundle:
    """Load and verify a packed dataset.

    Every file is compared with its SHA-256, every array with its expected shape, dtype, unit and range. All data are
    decoded once into memory (the bundled pack: about 130 MB).

    Parameters
    ----------
    path
        Folder of the pack.
    max_toa_imbalance
        W/m2; leave out climates whose label segment is further from balance. None: keep all.
    max_ts_drift
        K; leave out climates whose mean surface temperature moved more between the segments. None: keep all. A climate
        that is left out is also masked in the history of its planet's later epochs.

    Raises
    ------
    DataError
        A file is missing, truncated, changed or out of range (names file and field), or no climate is accepted.
    """
    pack = _accepted(open_pack(Path(path)), max_toa_imbalance, max_ts_drift)
    for name in pack.manifest[
        "files"
    ]:  # all digests first (0.02 s): a damaged file is named before anything is decoded
        verified_bytes(pack.root, name, pack.manifest)
    with ThreadPoolExecutor(_THREADS) as pool:
        cubes = dict(
            zip(
                (_key(c.planet, c.epoch) for c in pack.climates),
                pool.map(lambda row: _cube(pack, row), pack.climates),
                strict=True,
            )
        )
        organisms = {
            o.organism: e
            for o, e in zip(pack.organisms, pool.map(lambda row: _organism(pack, row), pack.organisms), strict=True)
        }
    planets = _planets(pack, cubes)
    encoder = TextEncoder(load_tokenizer(pack.root / "tokenizer.json"), pack.spec.max_text_tokens)
    tokens = encoder.encode_pairs(
        {k: p.text for k, p in planets.items()}, {k: o.text for k, o in organisms.items()}, str(pack.root)
    )
    store = Store(pack.spec, planets, organisms, tokens)
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
