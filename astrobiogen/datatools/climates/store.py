"""Many climates in one Zarr store or netCDF file: one chunk per (planet, epoch, segment) and variable, read lazily.

Axes: climate, segment, time, lev, lat, lon. Global attribute ``climates`` names the rows ("earth_g2"); the acceptance
figures are ``toa_imbalance`` [climate, segment] and ``ts_drift`` [climate]. What a climate does not have is NaN, and is
never in a chunk. The store opens with xarray alone: ``xarray.open_zarr(path, consolidated=False)``.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import netCDF4
import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from astrobiogen.data.climates import cubes
from astrobiogen.data.errors import DataError
from astrobiogen.data.storage.guarded import check_stated_size
from astrobiogen.data.storage.pack import Pack
from astrobiogen.datatools.climates.grids import Grid
from astrobiogen.datatools.climates.variables import VARIABLES
from astrobiogen.datatools.progress import track
from astrobiogen.system import staging

SEGMENTS = (cubes.INPUT_SEGMENT, cubes.LABEL_SEGMENT)
_AXES = ("climate", "segment")


@dataclass(frozen=True)
class Entry:
    """One (planet, epoch, segment) to be written: fields [T, lev, lat, lon] or [T, lat, lon] in our units."""

    planet: str
    epoch: int
    segment: int
    fields: Mapping[str, NDArray[np.floating]]
    toa_imbalance: float = math.nan
    ts_drift: float = math.nan


def climate_key(planet: str, epoch: int) -> str:
    """Name of a row: ``earth_g2``."""
    return f"{planet}_g{epoch}"


class _Target(Protocol):
    """What both file formats can do with a variable: take a block."""

    def __setitem__(self, key: Any, value: Any, /) -> None: ...


@contextlib.contextmanager
def _created(path: Path, keys: Sequence[str], names: Sequence[str], grid: Grid) -> Iterator[Mapping[str, _Target]]:
    """Empty arrays of a new file, by name; closed at the end."""
    sizes = {"climate": len(keys), "segment": len(SEGMENTS), "time": grid.months, "lev": grid.levels.size,
             "lat": grid.latitudes.size, "lon": grid.longitudes.size}  # fmt: skip
    layout: dict[str, tuple[tuple[str, ...], str]] = {
        name: ((*_AXES, *VARIABLES[name].axes), VARIABLES[name].unit) for name in names
    }
    layout |= {"toa_imbalance": (_AXES, "W m-2"), "ts_drift": (("climate",), "K")}
    axes = {
        "lev": (grid.levels, "1"),
        "lat": (grid.latitudes, "degrees_north"),
        "lon": (grid.longitudes, "degrees_east"),
    }
    attributes = {"climates": json.dumps(list(keys)), "Conventions": "CF-1.10", "title": "climates of astrobiogen"}

    def chunks(dims: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(1 if d in _AXES else sizes[d] for d in dims)

    if path.suffix == ".zarr":
        group = zarr.open_group(path, mode="w-")
        group.attrs.update(attributes)
        for axis, (values, unit) in axes.items():
            made = group.create_array(axis, data=values, dimension_names=(axis,), chunks=values.shape)
            made.attrs["units"] = unit
        found: dict[str, _Target] = {}
        for name, (dims, unit) in layout.items():
            shape = tuple(sizes[d] for d in dims)
            found[name] = group.create_array(
                name, shape=shape, chunks=chunks(dims), dtype="float32", fill_value=math.nan, dimension_names=dims,
                attributes={"units": unit},
            )  # fmt: skip
        yield found
        return
    with netCDF4.Dataset(path, "w", clobber=False) as file:
        file.setncatts(attributes)
        for axis, size in sizes.items():
            file.createDimension(axis, size)
        for axis, (values, unit) in axes.items():
            coordinate = file.createVariable(axis, "f8", (axis,))
            coordinate[:] = values
            coordinate.units = unit
        found = {}
        for name, (dims, unit) in layout.items():
            variable = file.createVariable(name, "f4", dims, zlib=True, complevel=4, chunksizes=chunks(dims),
                                           fill_value=np.float32(math.nan))  # fmt: skip
            variable.units = unit
            found[name] = variable
        yield found


def write_store(path: Path, keys: Sequence[str], names: Sequence[str], grid: Grid, entries: Iterable[Entry]) -> None:
    """Write a new ``.zarr`` store or ``.nc`` file, one entry in memory at a time; it is at ``path`` when it is whole.

    Raises:
        DataError: ``path`` exists or has another suffix, or an entry does not fit: nothing is left at ``path``.
    """
    if path.suffix not in (".zarr", ".nc"):
        raise DataError(path, "", "suffix must be .zarr or .nc")
    if path.exists():
        raise DataError(path, "", "exists already; nothing was changed")
    with (
        staging.owned(staging.target_of(path)),
        staging.staged(path, new=True) as part,
        _created(part, keys, names, grid) as arrays,
    ):
        for entry in entries:
            _write_entry(path, keys, grid, arrays, entry)


def _write_entry(path: Path, keys: Sequence[str], grid: Grid, arrays: Mapping[str, _Target], entry: Entry) -> None:
    key = climate_key(entry.planet, entry.epoch)
    if key not in keys or entry.segment not in SEGMENTS:
        raise DataError(path, key, f"segment {entry.segment} is not one of this store")
    row, segment = list(keys).index(key), SEGMENTS.index(entry.segment)
    for name, values in entry.fields.items():
        volume = (grid.levels.size,) if "lev" in VARIABLES[name].axes else ()
        wanted = (grid.months, *volume, grid.latitudes.size, grid.longitudes.size)
        if values.shape != wanted:
            raise DataError(path, f"{key} {name}", f"shape {values.shape}, expected {wanted}")
        arrays[name][row, segment] = values.astype(np.float32)
    arrays["toa_imbalance"][row, segment] = entry.toa_imbalance
    if math.isfinite(entry.ts_drift):
        arrays["ts_drift"][row] = entry.ts_drift


class ClimateStore:
    """Lazy reader of what ``write_store`` wrote; use it as a context manager.

    Attributes:
        climates: Names of the rows.
        toa_imbalance, ts_drift: float [climate, segment] W/m2 and [climate] K between the segments' means.
        dataset: The xarray dataset; nothing but coordinates is read until a value is used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(self.path, "", "is missing")
        try:
            if self.path.suffix == ".zarr":
                self.dataset = xr.open_zarr(self.path, chunks=None, consolidated=False)
            else:
                self.dataset = xr.open_dataset(self.path, engine="netcdf4")
            check_stated_size(self.path, max((v.nbytes for v in self.dataset.variables.values()), default=0))
            self.climates: tuple[str, ...] = tuple(json.loads(self.dataset.attrs["climates"]))
            self.toa_imbalance = np.asarray(self.dataset["toa_imbalance"].values, np.float64)
            self.ts_drift = np.asarray(self.dataset["ts_drift"].values, np.float64)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise DataError(self.path, "", f"is not a climate store ({error})") from error

    def __enter__(self) -> ClimateStore:
        """The store itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the files."""
        self.dataset.close()

    def accepted(self, max_toa_imbalance: float = math.inf, max_drift: float = math.inf) -> tuple[str, ...]:
        """Climates whose label segment is balanced within ``max_toa_imbalance`` [W/m2] and whose mean surface
        temperature moved by at most ``max_drift`` [K] between the segments; an unknown figure fails a finite limit.
        """
        balance = np.abs(self.toa_imbalance[:, SEGMENTS.index(cubes.LABEL_SEGMENT)])
        drift = np.abs(self.ts_drift)
        good = np.ones(len(self.climates), bool)
        for values, limit in ((balance, max_toa_imbalance), (drift, max_drift)):
            if math.isfinite(limit):
                good &= values <= limit  # NaN compares false
        return tuple(name for name, keep in zip(self.climates, good, strict=True) if keep)

    def read(self, climate: str, segment: int, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Fields of one (planet, epoch, segment); reads one chunk per variable.

        Raises:
            DataError: The store has no such climate, segment or variable, or its chunk is missing, damaged or holds
                NaN.
        """
        if climate not in self.climates or segment not in SEGMENTS:
            raise DataError(self.path, f"{climate} segment {segment}", f"absent; the store holds {self.climates}")
        place = {"climate": self.climates.index(climate), "segment": SEGMENTS.index(segment)}
        found: dict[str, NDArray[np.float32]] = {}
        for name in names:
            where = f"{climate} segment {segment} {name}"
            if name not in self.dataset:
                raise DataError(
                    self.path, where, f"variable absent; the store holds {sorted(map(str, self.dataset.data_vars))}"
                )
            try:
                values = np.asarray(self.dataset[name].isel(place).values, np.float32)
            except (OSError, RuntimeError, ValueError) as error:
                raise DataError(self.path, where, f"damaged ({error})") from error
            if not np.isfinite(values).all():
                share = float((~np.isfinite(values)).mean())
                raise DataError(self.path, where, "absent" if share == 1.0 else f"{share:.1%} of the values are NaN")
            found[name] = values
        return found

    def history(
        self, planet: str, epoch: int, names: Sequence[str], n_epochs: int, segment: int = cubes.INPUT_SEGMENT
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Cube [V, T, G, lev, lat, lon] of the epochs up to ``epoch``, aligned at the end, and mask [G]; an epoch that
        the store lacks is zero and masked, never repeated.
        """
        shape = tuple(self.dataset.sizes[d] for d in ("time", "lev", "lat", "lon"))
        cube = np.zeros((len(names), shape[0], n_epochs, *shape[1:]), np.float32)
        mask = np.zeros(n_epochs, bool)
        for g in range(n_epochs):
            key = climate_key(planet, epoch - (n_epochs - 1 - g))
            if key in self.climates:
                fields = self.read(key, segment, names)
                cube[:, :, g] = np.stack([fields[name] for name in names])
                mask[g] = True
        if not mask[-1]:
            raise DataError(self.path, climate_key(planet, epoch), f"absent; the store holds {self.climates}")
        return cube, mask


def export_pack(pack: Pack, path: Path) -> None:
    """The climates of a pack in physical units as one store: input fields in segment 1, label fields in segment 2."""
    spec = pack.spec
    shape = (spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes))
    grid = Grid(np.array(spec.levels), np.array(spec.latitudes), np.array(spec.longitudes), spec.months)

    def entries() -> Iterator[Entry]:
        for row in track(pack.climates, "climates", len(pack.climates), lambda r: climate_key(r.planet, r.epoch)):
            codes = cubes.read_codes(pack.contents(row.cube_file), shape)
            fields = {name: cubes.value_table(name, int(c.max()) + 1)[c] for name, c in codes.items()}
            yield Entry(row.planet, row.epoch, cubes.INPUT_SEGMENT, fields, row.toa_imbalance_input, row.ts_drift)
            ts, sic = cubes.read_surface(pack.root / row.surface_file, shape[0], *shape[2:])
            label = {"ts": ts, "sic": sic}
            yield Entry(row.planet, row.epoch, cubes.LABEL_SEGMENT, label, row.toa_imbalance_label)

    keys = [climate_key(row.planet, row.epoch) for row in pack.climates]
    write_store(path, keys, (*cubes.VARIABLES, "ts", "sic"), grid, entries())
