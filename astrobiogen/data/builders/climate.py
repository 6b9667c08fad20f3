"""ExoPlaSim (and like-named) netCDF files to checked arrays, by xarray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError

# Names of the same field in ExoPlaSim / CMIP, ROCKE-3D, ExoCAM / CESM, the UM and ERA, and the unit strings that mean
# the expected unit.
ALIASES: dict[str, tuple[str, ...]] = {
    "ta": ("ta", "t", "T", "temp", "air_temperature", "temperature"),
    "hus": ("hus", "q", "Q", "qatm", "specific_humidity", "humidity"),
    "ts": ("ts", "TS", "gtempr", "tsurf", "surface_temperature", "skt"),
    "sic": ("sic", "ICEFRAC", "oicefr", "sea_ice_area_fraction", "siconc", "ci"),
}
UNITS: dict[str, tuple[str, ...]] = {
    "ta": ("K", "kelvin"),
    "hus": ("1", "kg kg-1", "kg/kg", "kg kg**-1"),
    "ts": ("K", "kelvin"),
    "sic": ("1", "", "fraction"),
}


@dataclass(frozen=True)
class Grid:
    """Coordinates of a file: sigma levels from the top, latitudes from the north, longitudes eastward from 0."""

    levels: NDArray[np.float64]
    latitudes: NDArray[np.float64]
    longitudes: NDArray[np.float64]
    months: int


@dataclass(frozen=True)
class ClimateFile:
    """Fields of one (planet, epoch, segment) as float64: 3-D ones [T, lev, lat, lon], surface ones [T, lat, lon]."""

    path: Path
    fields: dict[str, NDArray[np.float64]]
    grid: Grid
    parameters: dict[str, Any]
    display_name: str
    toa_imbalance: float


def _pick(dataset: xr.Dataset, path: Path, name: str) -> xr.DataArray:
    for alias in ALIASES[name]:
        if alias in dataset.data_vars:
            array = dataset[alias]
            units = array.attrs.get("units")
            if units not in UNITS[name]:
                raise DataError(path, alias, f"units {units!r}, expected one of {UNITS[name]}")
            return array
    raise DataError(
        path,
        name,
        f"variable absent (looked for {ALIASES[name]}); the file holds {sorted(map(str, dataset.data_vars))}",
    )


def _values(array: xr.DataArray, path: Path, name: str) -> NDArray[np.float64]:
    order = ("time", "lev", "lat", "lon") if name in ("ta", "hus") else ("time", "lat", "lon")
    if set(array.dims) != set(order):
        raise DataError(path, name, f"axes {array.dims}, expected {order}")
    array = array.transpose(*order).sortby("lat", ascending=False).sortby("lon")
    if "lev" in array.dims:
        array = array.sortby("lev")
    values = np.asarray(array.values, np.float64)
    if not np.isfinite(values).all():
        raise DataError(path, name, f"{int((~np.isfinite(values)).sum())} values are NaN or infinite")
    if name in ("ta", "ts") and not 90.0 < values.min() <= values.max() < 500.0:
        raise DataError(path, name, f"values {values.min():.4g} to {values.max():.4g} K are not temperatures")
    return values


def read_climate(path: Path, variables: tuple[str, ...]) -> ClimateFile:
    """Read and check one file; axes come out as (time, lev, lat, lon), north first, top first, longitude from 0.

    Raises
    ------
    DataError
        Unreadable or truncated file, absent variable, wrong units, wrong axes, non-finite or impossible values,
        missing parameters.
    """
    try:
        with xr.open_dataset(path, decode_times=False, engine="netcdf4") as dataset:
            dataset = dataset.assign_coords(lon=dataset["lon"] % 360.0)
            fields = {name: _values(_pick(dataset, path, name), path, name) for name in variables}
            grid = Grid(
                np.sort(dataset["lev"].values.astype(np.float64)),
                np.sort(dataset["lat"].values.astype(np.float64))[::-1].copy(),
                np.sort(dataset["lon"].values.astype(np.float64)),
                int(dataset.sizes["time"]),
            )
            weights = xr.DataArray(np.cos(np.radians(dataset["lat"])))
            balance = float((dataset["rst"] + dataset["rlut"]).mean(("time", "lon")).weighted(weights).mean("lat"))
            attributes = dict(dataset.attrs)
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(path, "", f"cannot be read as a climate file ({error})") from error
    if "parameters" not in attributes:
        raise DataError(path, "parameters", "global attribute absent")
    return ClimateFile(
        path, fields, grid, json.loads(attributes["parameters"]), str(attributes.get("planet", "")), balance
    )
