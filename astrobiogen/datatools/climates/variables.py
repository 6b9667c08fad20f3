"""Names, units and sign conventions of the same field in the files of different climate models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates import conventions

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
    standard_names: tuple[str, ...] = ()

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
        ("air_temperature",),
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
        ("specific_humidity",),
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
        ("surface_temperature",),
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
        ("sea_ice_area_fraction",),
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
        ("surface_air_pressure",),
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
        ("toa_net_downward_shortwave_flux",),
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
        ("toa_outgoing_longwave_flux",),
    ),
}
COORDINATES: dict[str, tuple[str, ...]] = {
    "time": ("time", "month", "valid_time", "Time"),
    "lev": ("lev", "level", "plev", "plm", "pressure", "pressure_level", "isobaricInhPa", "sigma", "level_sigma"),
    "lat": ("lat", "latitude", "lat_2", "Latitude", "nav_lat"),
    "lon": ("lon", "longitude", "lon_2", "Longitude", "nav_lon"),
}


def with_our_axes(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    """``dataset`` with its axes named time, lev, lat, lon: by the names that models use, in any case, else by what
    their attributes say of them (CF). Other axes are left alone.

    Raises:
        DataError: A latitude or longitude is a text.
    """
    found = {}
    for ours, names in COORDINATES.items():
        known = {name.lower() for name in names}
        present = next((n for n in (*names, *dataset.dims) if n in dataset.dims and str(n).lower() in known), None)
        if present is None:
            present = conventions.axis(dataset, ours)
        if present is not None and present != ours:
            found[present] = ours
    renamed = dataset.rename(found) if found else dataset
    for axis in ("lat", "lon"):
        if axis in renamed.coords and renamed[axis].dtype.kind not in "fiu":
            raise DataError(path, axis, f"values are of type {renamed[axis].dtype}, expected numbers")
    return renamed


def pick(dataset: xr.Dataset, path: Path, name: str) -> xr.DataArray:
    """Variable ``name`` (ours) under whatever name the file has it, else by its ``standard_name``, converted to our
    unit by its ``units`` attribute.

    Raises:
        DataError: No alias is in the file, several are and their ``standard_name`` does not tell which is meant, or the
            unit is absent or unknown: a unit is never guessed from the values.
    """
    rule = VARIABLES[name]
    named = conventions.of_quantity(dataset, rule.standard_names)
    found = [n for n in rule.all_names if n in dataset.data_vars] or named
    if len(found) > 1:
        found = [n for n in found if n in named] if len(set(found) & set(named)) == 1 else found
    if not found:
        held = sorted(map(str, dataset.data_vars))
        text = f"variable absent (looked for {rule.all_names} and standard_name {rule.standard_names})"
        raise DataError(path, name, f"{text}; the file holds {held}")
    if len(found) > 1:
        text = f"the file holds {sorted(map(str, found))}: which one is meant cannot be told, leave one"
        raise DataError(path, name, text)
    array = dataset[found[0]]
    scale, offset = unit_of(array, path, name)
    return array if (scale, offset) == (1.0, 0.0) else array * scale + offset


def unit_of(array: xr.DataArray, path: Path, name: str) -> tuple[float, float]:
    """(scale, offset) from the unit of ``array`` to ours for ``name``.

    Raises:
        DataError: The unit is absent or unknown.
    """
    rule, stated = VARIABLES[name], array.attrs.get("units")
    known = None
    if isinstance(stated, str):
        known = rule.units.get(stated) or conventions.conversion(stated, rule.unit)
    if known is None:
        text = f"units {stated!r}, expected {rule.unit!r}, one of {sorted(rule.units)}, or what converts to it"
        raise DataError(path, str(array.name), text)
    return known
