"""Names, units and sign conventions of the same field in the files of different climate models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from astrobiogen.data.errors import DataError

VOLUME, SURFACE = ("time", "lev", "lat", "lon"), ("time", "lat", "lon")
Units = dict[str, tuple[float, float]]  # unit string -> (scale, offset) to the unit of the library


def _units(names: str, scale: float = 1.0, offset: float = 0.0) -> Units:
    return dict.fromkeys(names.split("|"), (scale, offset))


KELVIN = _units("K|kelvin|degK") | _units("C|degC|deg C|celsius|Celsius|degrees_C|deg_C|°C", 1.0, 273.15)
MASS_RATIO = _units("1|kg kg-1|kg/kg|kg kg**-1|kg kg^-1|kg/kg air") | _units("g kg-1|g/kg|g kg**-1", 1e-3)
FRACTION = _units("1||fraction|(0 - 1)|0-1") | _units("%|percent", 0.01)
PASCAL = _units("Pa|pascal") | _units("hPa|mbar|mb|millibar|millibars", 100.0)
FLUX = _units("W m-2|W/m2|W/m^2|W m**-2|Wm-2|watts/m2")


@dataclass(frozen=True)
class Variable:
    """One field: unit of the library, axes, names by climate model, accepted unit strings, and what is physically
    possible.
    """

    unit: str
    axes: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    units: Mapping[str, tuple[float, float]]
    limits: tuple[float, float]

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names in every model, ours (ExoPlaSim's) first."""
        return tuple(dict.fromkeys(name for names in self.names.values() for name in names))


VARIABLES: dict[str, Variable] = {
    "ta": Variable(
        "K",
        VOLUME,
        {
            "ExoPlaSim": ("ta",),
            "ROCKE-3D": ("TempL", "temp", "t"),
            "ExoCAM": ("T",),
            "UM": ("air_temperature", "STASH_m01s16i004"),
            "ERA": ("t", "temperature"),
        },
        KELVIN,
        (90.0, 500.0),
    ),
    "hus": Variable(
        "kg kg-1",
        VOLUME,
        {
            "ExoPlaSim": ("hus",),
            "ROCKE-3D": ("SpHuL", "q", "qatm"),
            "ExoCAM": ("Q",),
            "UM": ("specific_humidity", "STASH_m01s00i010"),
            "ERA": ("q", "humidity"),
        },
        MASS_RATIO,
        (-1e-6, 1.0),
    ),
    "ts": Variable(
        "K",
        SURFACE,
        {
            "ExoPlaSim": ("ts",),
            "ROCKE-3D": ("gtempr", "tgrnd", "tsurf"),
            "ExoCAM": ("TS",),
            "UM": ("surface_temperature", "STASH_m01s00i024"),
            "ERA": ("skt", "skin_temperature"),
        },
        KELVIN,
        (90.0, 500.0),
    ),
    "sic": Variable(
        "1",
        SURFACE,
        {
            "ExoPlaSim": ("sic",),
            "ROCKE-3D": ("oicefr", "ocicefr"),
            "ExoCAM": ("ICEFRAC",),
            "UM": ("sea_ice_area_fraction", "STASH_m01s00i031"),
            "ERA": ("ci", "siconc", "sea_ice_cover"),
        },
        FRACTION,
        (-1e-3, 1.001),
    ),
    "ps": Variable(
        "Pa",
        SURFACE,
        {
            "ExoPlaSim": ("ps",),
            "ROCKE-3D": ("prsurf",),
            "ExoCAM": ("PS",),
            "UM": ("surface_air_pressure", "STASH_m01s00i409"),
            "ERA": ("sp", "surface_pressure"),
        },
        PASCAL,
        (1.0, 1e8),
    ),
    "rst": Variable(
        "W m-2",
        SURFACE,
        {
            "ExoPlaSim": ("rst",),
            "ROCKE-3D": ("srnf_toa",),
            "ExoCAM": ("FSNT", "FSNTOA"),
            "UM": ("toa_net_downward_shortwave_flux",),
            "ERA": ("tsr",),
        },
        FLUX,
        (-1e5, 1e5),
    ),
    # Outgoing long-wave radiation cannot be negative, so its sign tells the convention: `net_at_top` takes its size.
    "rlut": Variable(
        "W m-2",
        SURFACE,
        {
            "ExoPlaSim": ("rlut",),
            "ROCKE-3D": ("trnf_toa", "olr"),
            "ExoCAM": ("FLNT", "FLUT"),
            "UM": ("toa_outgoing_longwave_flux", "STASH_m01s02i205"),
            "ERA": ("ttr",),
        },
        FLUX,
        (-1e5, 1e5),
    ),
}
COORDINATES: dict[str, tuple[str, ...]] = {
    "time": ("time", "month", "valid_time", "Time"),
    "lev": ("lev", "level", "plev", "plm", "pressure", "pressure_level", "isobaricInhPa", "sigma", "level_sigma"),
    "lat": ("lat", "latitude", "lat_2", "Latitude", "nav_lat"),
    "lon": ("lon", "longitude", "lon_2", "Longitude", "nav_lon"),
}


def with_our_axes(dataset: xr.Dataset) -> xr.Dataset:
    """``dataset`` with its axes named time, lev, lat, lon; other axes are left alone."""
    found = {}
    for ours, names in COORDINATES.items():
        present = next((n for n in names if n in dataset.dims), None)
        if present is not None and present != ours:
            found[present] = ours
    return dataset.rename(found) if found else dataset


def pick(dataset: xr.Dataset, path: Path, name: str) -> xr.DataArray:
    """Variable ``name`` (ours) under whatever name the file has it, converted to our unit by its ``units`` attribute.

    Raises:
        DataError: No alias is in the file, or the unit is absent or unknown: a unit is never guessed from the values.
    """
    rule = VARIABLES[name]
    alias = next((n for n in rule.all_names if n in dataset.data_vars), None)
    if alias is None:
        held = sorted(map(str, dataset.data_vars))
        raise DataError(path, name, f"variable absent (looked for {rule.all_names}); the file holds {held}")
    array = dataset[alias]
    stated = array.attrs.get("units")
    if not isinstance(stated, str) or stated not in rule.units:
        raise DataError(path, alias, f"units {stated!r}, expected {rule.unit!r} or one of {sorted(rule.units)}")
    scale, offset = rule.units[stated]
    return array if (scale, offset) == (1.0, 0.0) else array * scale + offset
