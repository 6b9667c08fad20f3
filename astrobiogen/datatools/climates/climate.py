"""Climate model output (netCDF or Zarr, by xarray) to checked arrays on one grid.

Files of ExoPlaSim, ROCKE-3D, ExoCAM, the UM and ERA are understood by the names in ``variables``; units come from the
``units`` attribute, never from the values. Latitudes may run either way, longitudes may start anywhere, levels may be
sigma, pressure (with surface pressure in the file) or the hybrid levels of CESM, and any number of time steps from 12
on becomes 12 parts of the year. Data are read lazily: only the variables that are asked for leave the disk.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.data.storage.guarded import check_stated_size
from astrobiogen.datatools.climates import conventions, grids, times, variables
from astrobiogen.datatools.climates.grids import Floats, Grid

_PRESSURE_UNITS = variables.PASCAL
_SIGMA_UNITS = ("1", "", "nondimensional", "nondimen", "sigma", "sigma_level", "level", "layer")
_FEWEST_LEVELS, _LOWEST_SIGMA, _HIGHEST_SIGMA = 4, 0.8, 1.2
_LEAST_P0 = 5000.0  # a reference pressure without a unit below this is more likely in hPa than of a thin atmosphere
_SUFFIXES = (".nc", ".nc4")
_ACCUMULATED = ("J m**-2", "J m-2", "J/m2", "J m^-2")
_PARAMETERS = "parameters"
_LARGEST_GAP = 2.5  # of the median step of a coordinate, between neighbours or to the pole: more is no global grid


@dataclass(frozen=True)
class ClimateFile:
    """Fields of one (planet, epoch, segment) as float64: 3-D ones [T, lev, lat, lon], surface ones [T, lat, lon].

    ``toa_imbalance`` [W/m2] is the mean net downward radiation at the top, ``ts_mean`` [K] the mean surface
    temperature; NaN when the file lacks them.
    """

    path: Path
    fields: dict[str, Floats]
    grid: Grid
    parameters: dict[str, Any]
    toa_imbalance: float
    ts_mean: float


@contextmanager
def opened(path: Path) -> Iterator[xr.Dataset]:
    """The file, Zarr store, or folder of netCDF files (one per group of variables) at ``path``, lazily, axes named as
    ours.

    Raises:
        DataError: Missing, truncated or in another format, also when that shows only while reading inside the block.
    """
    if not path.exists():
        raise DataError(path, "", "is missing")
    try:
        if path.suffix == ".zarr":
            with xr.open_zarr(path, decode_times=False, chunks=None, consolidated=False) as dataset:
                yield _with_our_axes(path, dataset)
        elif path.is_dir():
            names = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not names:
                raise DataError(path, "", "is a folder without .nc or .nc4 files")
            parts = [xr.open_dataset(p, decode_times=False, engine="netcdf4") for p in names]
            try:
                yield times.as_one(path, [_with_our_axes(p, part) for p, part in zip(names, parts, strict=True)])
            finally:
                for part in parts:
                    part.close()
        else:
            with xr.open_dataset(path, decode_times=False, engine="netcdf4") as dataset:
                yield _with_our_axes(path, dataset)
    except DataError:
        raise
    except (AttributeError, OSError, KeyError, RuntimeError, ValueError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, AttributeError) and "NetCDF" not in str(error):  # netCDF4's for a damaged attribute
            raise
        raise DataError(path, "", f"cannot be read as a climate file ({' '.join(str(error).split())[:200]})") from error


def _with_our_axes(path: Path, dataset: xr.Dataset) -> xr.Dataset:
    """``dataset`` of ``path`` with our axes, none of its variables larger than the file can hold."""
    check_stated_size(path, max((variable.nbytes for variable in dataset.variables.values()), default=0))
    return variables.with_our_axes(dataset, path)


def _gap(values: Floats, axis: str) -> str:
    """What keeps ascending coordinates [degrees] from covering the sphere, empty when nothing does: regridding would
    stretch a regional file over the whole planet.
    """
    if not np.isfinite(values).all() or (axis == "lat" and np.abs(values).max() > 90.0 + grids.SAME_DEGREES):
        return f"values {values.min():.4g} to {values.max():.4g}, expected degrees"
    steps = np.diff(values)
    ends = [values[0] + 90.0, 90.0 - values[-1]] if axis == "lat" else [values[0] + 360.0 - values[-1]]
    if steps.size == 0 or max(*steps, *ends) > _LARGEST_GAP * np.median(steps):
        return f"{values.size} values from {values[0]:.4g} to {values[-1]:.4g} do not cover the sphere"
    return ""


def _oriented(array: xr.DataArray, path: Path, name: str) -> xr.DataArray:
    """Axes in our order, north first, longitudes ascending from 0."""
    wanted = variables.VARIABLES[name].axes
    if "time" not in array.dims:
        raise DataError(path, name, f"axes {array.dims}, expected {wanted}")
    extra = [d for d in array.dims if d not in wanted and array.sizes[d] == 1]
    array = array.squeeze(extra, drop=True)
    if set(array.dims) != set(wanted):
        raise DataError(path, name, f"axes {array.dims}, expected {wanted}")
    array = array.assign_coords(lon=array["lon"] % 360.0)
    for axis in ("lat", "lon"):
        if problem := _gap(np.sort(np.asarray(array[axis].values, np.float64)), axis):
            raise DataError(path, axis, problem)
    return array.transpose(*wanted).sortby("lat", ascending=False).sortby("lon")


def _checked(values: NDArray[Any], path: Path, name: str, below_ground: bool = False) -> Floats:
    """float64 values, physically possible, no level of zeros, and finite unless ``below_ground`` allows NaN."""
    values = np.asarray(values, np.float64)
    rule = variables.VARIABLES[name]
    known = np.isfinite(values)
    if not known.all() and not (below_ground and known.any() and not np.isinf(values).any()):
        raise DataError(path, name, f"{int((~known).sum())} values are NaN or infinite")
    low, high = np.nanmin(values), np.nanmax(values)
    if not rule.limits[0] < low <= high < rule.limits[1]:
        raise DataError(path, name, f"values {low:.4g} to {high:.4g} {rule.unit} lie outside {rule.limits}")
    if name == "hus" and values.ndim == 4 and not np.nan_to_num(values[:, -1]).any():
        raise DataError(path, name, "the lowest level is zero everywhere")
    return values


def _without_land(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Sea ice of 0 where a file has none at any time: NaN over land."""
    unknown = np.isnan(values)
    always = unknown.all(axis=0) if name == "sic" and unknown.any() else np.zeros(values.shape[1:], bool)
    return np.where(always, 0.0, values) if always.any() and not always.all() else values


def _sigma(dataset: xr.Dataset, array: xr.DataArray, path: Path) -> tuple[Floats, bool]:
    """Sigma of each level, [L] or, where it depends on surface pressure, [T, L, lat, lon]; and whether levels may lie
    below the ground.
    """
    attributes = array["lev"].attrs if "lev" in array.coords else {}
    in_pressure = attributes.get("standard_name") == "air_pressure"
    # a file on pressure levels may keep the coefficients of the levels that it was interpolated from
    if not in_pressure and all(n in dataset and dataset[n].size == array.sizes["lev"] for n in ("hyam", "hybm")):
        a = _hybrid_pressure(dataset, path)[None, :, None, None]
        b = np.asarray(dataset["hybm"].values, np.float64).reshape(-1)[None, :, None, None]
        return a / _surface_pressure(dataset, path)[:, None] + b, False
    if "lev" not in array.coords:
        raise DataError(path, "lev", "levels have no coordinate values")
    levels = np.asarray(array["lev"].values, np.float64)
    unit = str(attributes.get("units", ""))
    if unit in _PRESSURE_UNITS:
        scale = _PRESSURE_UNITS[unit][0]
        return levels[None, :, None, None] * scale / _surface_pressure(dataset, path)[:, None], True
    if unit in _SIGMA_UNITS and levels.min() > 0.0 and levels.max() <= 1.01:
        return levels, False
    raise DataError(
        path,
        "lev",
        f"levels {levels.min():.4g} to {levels.max():.4g} with units {unit!r}: expected sigma in (0, 1], "
        f"a pressure unit {sorted(_PRESSURE_UNITS)}, or hyam and hybm",
    )


def _hybrid_pressure(dataset: xr.Dataset, path: Path) -> Floats:
    """The pressure part [L] of hybrid levels in Pa: `hyam` itself where it has a unit of pressure (ECHAM, ICON, IFS),
    else `hyam` times the reference pressure `P0` (CESM), 1e5 Pa where the file has none.
    """
    values = np.asarray(dataset["hyam"].values, np.float64).reshape(-1)
    unit = str(dataset["hyam"].attrs.get("units", ""))
    if unit in _PRESSURE_UNITS:
        return values * _PRESSURE_UNITS[unit][0]
    if unit not in _SIGMA_UNITS or not np.abs(values).max() <= 1.0:
        text = f"values up to {np.abs(values).max():.4g} with units {unit!r}: expected at most 1 without a unit, or a"
        raise DataError(path, "hyam", f"{text} pressure unit {sorted(_PRESSURE_UNITS)}")
    if "P0" not in dataset:
        return values * 1e5
    reference, unit = float(dataset["P0"]), str(dataset["P0"].attrs.get("units", ""))
    if unit not in _PRESSURE_UNITS and not (unit == "" and reference >= _LEAST_P0):
        text = f"is {reference:.4g} with units {unit!r}: expected a pressure unit {sorted(_PRESSURE_UNITS)}"
        raise DataError(path, "P0", text)
    return values * reference * _PRESSURE_UNITS.get(unit, (1.0, 0.0))[0]


def _require_levels(path: Path, name: str, sigma: Floats) -> None:
    """Refuse levels (ascending, axis 0 of [L], axis 1 of [T, L, lat, lon]) from which a profile down to the ground
    would be made up: too few, or none near the surface, as where hPa are called Pa.
    """
    count = sigma.shape[0 if sigma.ndim == 1 else 1]
    if count < _FEWEST_LEVELS:
        raise DataError(path, name, f"{count} levels, expected at least {_FEWEST_LEVELS}")
    lowest = float(np.nanmean(sigma[-1] if sigma.ndim == 1 else sigma[:, -1]))
    if not _LOWEST_SIGMA <= lowest <= _HIGHEST_SIGMA:
        text = f"the lowest level has p / p_surface {lowest:.3g} on average, expected {_LOWEST_SIGMA} to"
        raise DataError(
            path, "lev", f"{text} {_HIGHEST_SIGMA}: levels and surface pressure do not fit, or units are wrong"
        )


def _surface_pressure(dataset: xr.Dataset, path: Path) -> Floats:
    try:
        array = variables.pick(dataset, path, "ps")
    except DataError as error:
        raise DataError(path, "ps", f"surface pressure is needed for levels in pressure ({error.problem})") from error
    return _checked(_oriented(array, path, "ps").values, path, "ps")


def _field(dataset: xr.Dataset, path: Path, name: str, target: Grid | None) -> tuple[Floats, Grid]:
    """One variable on ``target`` (or on its own map and levels), 12 times."""
    array = _oriented(variables.pick(dataset, path, name), path, name)
    own = Grid(
        np.zeros(0),
        np.asarray(array["lat"].values, np.float64),
        np.asarray(array["lon"].values, np.float64),
        grids.MONTHS,
    )
    volume = "lev" in array.dims
    if volume:
        sigma, below_ground = _sigma(dataset, array, path)
        order = np.argsort(sigma if sigma.ndim == 1 else sigma.mean(axis=(0, 2, 3)), kind="stable")
        values = _checked(np.asarray(array.values)[:, order], path, name, below_ground)
        sigma = sigma[order] if sigma.ndim == 1 else sigma[:, order]
        _require_levels(path, name, sigma)
        own = replace(own, levels=sigma if sigma.ndim == 1 else np.array(grids.STANDARD_SIGMA))
        wanted = target.levels if target is not None else own.levels
        if sigma.ndim == 4 or not (target is None or own.same_levels(target)):
            values = _checked(grids.interpolate_levels(values, sigma, wanted), path, name)
            own = replace(own, levels=wanted)
    else:
        values = _checked(_without_land(array.values, name), path, name)
    values = times.to_months(values, times.dates(dataset, path), path)
    if target is not None and not own.same_map(target):
        values = grids.regrid(values, own, target)
        own = replace(own, latitudes=target.latitudes, longitudes=target.longitudes)
    return values, own


def area_mean(field: Floats, latitudes: Floats) -> float:
    """Mean over times and the sphere of [T, lat, lon]; weights are differences of the sine of latitude bounds."""
    edges = np.sin(np.radians(grids.latitude_edges(latitudes)))
    weights = np.abs(np.diff(edges)) / np.abs(edges[-1] - edges[0])
    return float(field.mean(axis=(0, 2)) @ weights)


def _mean_or_nan(dataset: xr.Dataset, path: Path, names: tuple[str, ...]) -> float:
    """Area-time mean of the net sum of surface fields; NaN when one of them is not in the file."""
    total = 0.0
    for name in names:
        rule = variables.VARIABLES[name]
        aliases = [alias for alias in rule.all_names if alias in dataset.data_vars]
        if not aliases and not conventions.of_quantity(dataset, rule.standard_names):
            return math.nan
        if any(str(dataset[alias].attrs.get("units", "")) in _ACCUMULATED for alias in aliases):
            return math.nan  # over a time that the file does not state
        array = _oriented(variables.pick(dataset, path, name), path, name)
        values = _checked(array.values, path, name)
        mean = area_mean(-np.abs(values) if name == "rlut" else values, np.asarray(array["lat"].values, np.float64))
        total += mean
    return total


def read_climate(path: Path, names: tuple[str, ...], target: Grid | None = None) -> ClimateFile:
    """Read and check one file; axes come out as (time 12, lev, lat, lon), north first, top first, longitude from 0.

    Args:
        path: ``.nc`` file, ``.zarr`` store, or folder of ``.nc`` files with one climate's variables.
        names: Variables by our names (keys of ``variables.VARIABLES``).
        target: Grid to bring everything to; None keeps the file's map and sigma levels.

    Raises:
        DataError: Unreadable or truncated file, absent variable, unknown unit, wrong axes, fewer than 12 times,
            non-finite or impossible values, an all-zero temperature level; names file and variable.
    """
    with opened(path) as dataset:
        for axis in ("lat", "lon", "time"):
            if axis not in dataset.coords:
                raise DataError(path, axis, f"coordinate absent; the file has {sorted(map(str, dataset.coords))}")
        fields: dict[str, Floats] = {}
        grid: Grid | None = None
        for name in names:
            fields[name], own = _field(dataset, path, name, target)
            if grid is None or grid.levels.size == 0:
                grid = own
        balance = _mean_or_nan(dataset, path, ("rst", "rlut"))
        ts_mean = _mean_or_nan(dataset, path, ("ts",))
        attributes = dict(dataset.attrs)
    if grid is None:
        raise DataError(path, "", "no variable was asked for")
    if target is not None:
        grid = target
    parameters = _parameters(path, attributes)
    return ClimateFile(path, fields, grid, parameters, balance, ts_mean)


def _parameters(path: Path, attributes: dict[str, Any]) -> dict[str, Any]:
    """The run's parameters: JSON in the global attribute ``parameters``, or in ``<file>.json`` beside the file."""
    beside = path.with_name(path.name + ".json")
    try:
        text = attributes[_PARAMETERS] if _PARAMETERS in attributes else beside.read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise DataError(path, _PARAMETERS, f"global attribute absent, and {beside.name} too") from error
    except ValueError as error:
        raise DataError(path, _PARAMETERS, f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(path, _PARAMETERS, f"is a {type(found).__name__}, expected an object")
    return found
