"""A user's own climates and networks, as the model that is asked reads them: its grid, units, means and deviations."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from astrobiogen.data.climates import cubes
from astrobiogen.data.dataset import OrganismEntry, PlanetEntry, Store
from astrobiogen.data.errors import DataError
from astrobiogen.data.networks.graphs import unpack_graph
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage.container import packed_arrays, parse_arrays
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs
from astrobiogen.data.text import TextEncoder, tokenizer_of
from astrobiogen.datatools.climates import climate, planets, variables
from astrobiogen.datatools.climates.grids import Grid
from astrobiogen.datatools.networks.network import encode_network
from astrobiogen.datatools.progress import say, track
from astrobiogen.datatools.workers import map_isolated

NETWORK_SUFFIXES = (".gz", ".xml", ".sbml", ".json")
_CLIMATE = re.compile(r".*\.(nc4?|zarr|nc4?\..*)", re.IGNORECASE)  # `.nc.gz` too, to be refused by name
# <planet>_g<epoch>, as data sets name their climates: earlier epochs of a planet are then the history of later ones.
_NAMED = re.compile(r"(?P<planet>[A-Za-z0-9-]+)_g(?P<epoch>\d)(_.*)?")
_CACHE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What could be read, by file, and what could not.

    Attributes:
        store: the climates and networks, named by their files.
        refused: file -> why it cannot be used.
    """

    store: Store
    refused: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Climate:
    """One climate file that was read: packed values by variable, parameters, and the (planet, epoch) of its name."""

    codes: dict[str, NDArray[np.int16]]
    params: dict[str, float]
    planet: str
    epoch: int | None


def climate_files(paths: Iterable[Path]) -> list[Path]:
    """Every climate that `paths` mean: a file, a Zarr store, a folder of climates, or a folder whose files hold the
    variables of one climate."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if _is_climate(p)) if _plain_folder(path) else []
        whole = [p for p in inside if p.suffix == ".zarr" or _holds_all(p)]
        found += inside if len(whole) == len(inside) > 0 or len(whole) > 1 else [path]
    return list(dict.fromkeys(found))


def network_files(paths: Iterable[Path]) -> list[Path]:
    """Every network that `paths` mean: files, and the SBML and JSON files of folders."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix in NETWORK_SUFFIXES) if path.is_dir() else []
        found += inside or [path]
    return list(dict.fromkeys(found))


def _is_climate(path: Path) -> bool:
    return _CLIMATE.fullmatch(path.name) is not None and not path.name.endswith(".json")


def _plain_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix != ".zarr"


def _holds_all(path: Path) -> bool:
    """Whether one file has both the temperature and the humidity; a file that cannot be opened counts: it is refused
    by name later."""
    try:
        with climate.opened(path) as dataset:
            return all(set(variables.VARIABLES[v].all_names) & set(dataset.data_vars) for v in cubes.VARIABLES)
    except DataError:
        return True


def read(
    climates: Sequence[Path], networks: Sequence[Path], statistics: Any, workers: int, catalogue: Path | None
) -> Inputs:
    """Read every file; one that is damaged or foreign costs itself only.

    Args:
        climates, networks: files, see `climate_files` and `network_files`.
        statistics: of the data that the model was trained on, see `DatasetBundle.statistics`.
        workers: processes that read networks.
        catalogue: the Open Exoplanet Catalogue's table, for what a climate file does not say of its star; None: that
            stays unknown.

    Raises:
        DataError: the statistics or the catalogue are damaged.
    """
    spec = DataSpec.from_json(json.dumps(statistics["spec"]), "statistics")
    refused: dict[str, str] = {}
    known = planets.read_catalogue(catalogue) if catalogue is not None else {}
    places = {
        str(path): found
        for path in track(climates, "climates", len(climates), lambda p: p.name)
        if (found := _tolerated(refused, path, lambda p: _climate(p, spec, known))) is not None
    }
    texts = {name: planets.description(found.params) for name, found in places.items()}
    graphs: dict[str, OrganismEntry] = {}
    results = zip(networks, map_isolated(encode_network, networks, workers))
    for path, arrays in track(results, "networks", len(networks), lambda item: item[0].name):
        entry = _tolerated(refused, path, lambda p, arrays=arrays: _organism(p, arrays))
        if entry is not None:
            graphs[str(path)] = entry
    reader = CubeCache(_Cubes({name: found.codes for name, found in places.items()}, spec), _CACHE_BYTES)
    encoder = TextEncoder(tokenizer_of(json.dumps(statistics["tokenizer"]), "statistics"), spec.max_text_tokens)
    tokens = encoder.encode_pairs(texts, dict.fromkeys(graphs, ""), "text")
    entries = {
        name: _planet(number, name, found, _history(name, found, places, spec.n_epochs), reader, spec, texts[name])
        for number, (name, found) in enumerate(places.items())
    }
    return Inputs(Store(spec, entries, graphs, tokens, reader), refused)


def _tolerated(refused: dict[str, str], path: Path, make: Any) -> Any:
    """What `make` makes of a file; None if the file is at fault, which `refused` then says."""
    try:
        return make(path)
    except DataError as error:
        refused[str(path)] = f"{error.field}: {error.problem}".removeprefix(": ")
        say(f"refused: {error}")
        return None


def _climate(path: Path, spec: DataSpec, catalogue: dict[str, dict[str, str]]) -> _Climate:
    target = Grid(np.array(spec.levels), np.array(spec.latitudes), np.array(spec.longitudes), spec.months)
    found = climate.read_climate(path, cubes.VARIABLES, target)
    named = _NAMED.fullmatch(path.stem if _is_climate(path) else path.name)
    prefix = named["planet"] if named else path.stem
    body = planets.CATALOGUE.get(prefix, planets.Body(prefix, prefix))
    params = planets.parameters(path, prefix, body, found.parameters, catalogue, lambda error: say(f"masked: {error}"))
    codes = {"ta": cubes.quantise_ta(found.fields["ta"]), "hus": cubes.quantise_hus(found.fields["hus"])}
    return _Climate(codes, params, prefix, int(named["epoch"]) if named else None)


def _organism(path: Path, arrays: dict[str, NDArray[Any]] | DataError) -> OrganismEntry:
    if isinstance(arrays, DataError):
        raise arrays
    graph = unpack_graph(parse_arrays(path, packed_arrays(path, arrays, {})))
    return OrganismEntry(graph, "", {"organism": str(path), "species": "", "genus": ""})


class _Cubes:
    """Standardised cubes by the name of their climate, made when they are asked for."""

    def __init__(self, codes: dict[str, dict[str, NDArray[np.int16]]], spec: DataSpec) -> None:
        self._codes = codes
        self._mean, self._std = np.array(spec.cube_mean), np.array(spec.cube_std)

    def __call__(self, name: str) -> torch.Tensor:
        """float32 [V, T, lev, lat, lon]."""
        return cubes.standardised(self._codes[name], self._mean, self._std)


def _history(name: str, found: _Climate, places: dict[str, _Climate], epochs: int) -> list[str | None]:
    """Files of the epochs up to this one; None where there is none, or more than one that could be meant."""
    history: list[str | None] = []
    for back in range(epochs - 1, 0, -1):
        earlier = [
            other
            for other, its in places.items()
            if found.epoch is not None and its.planet == found.planet and its.epoch == found.epoch - back
        ]
        history.append(earlier[0] if len(earlier) == 1 else None)
    return [*history, name]


def _planet(
    number: int, name: str, found: _Climate, history: list[str | None], reader: CubeCache, spec: DataSpec, text: str
) -> PlanetEntry:
    raw = torch.tensor([found.params.get(key, float("nan")) for key in spec.planet_param_names], dtype=torch.float64)
    mask = torch.isfinite(raw)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (spec.param_mean, spec.param_std))
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    spectrum = torch.stack([wave, torch.zeros_like(wave)], dim=1)
    unseen = torch.zeros(spec.n_wavelengths, dtype=torch.bool)
    metadata = {"planet": found.planet, "star_system": "", "epoch": found.epoch, "climate": name}
    params = torch.where(mask, (raw - mean) / std, 0.0).float()
    return PlanetEntry(number, params, mask, LazyEpochs(history, reader), spectrum, unseen, text, metadata)
