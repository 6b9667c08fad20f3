"""What the attributes of the CF conventions say of a file's axes, quantities and units, read by cf-xarray and pint.

Source: Eaton et al., NetCDF Climate and Forecast (CF) Metadata Conventions, version 1.12.
"""

from __future__ import annotations

import functools
import tokenize
from collections.abc import Hashable, Iterable

import cf_xarray  # noqa: F401 (adds `.cf` to xarray's objects)
import numpy as np
import pint
import xarray as xr
from cf_xarray.units import units as registry
from numpy.typing import NDArray

# our axis -> (cf-xarray's axis, cf-xarray's coordinate)
_AXES = {"time": ("T", "time"), "lev": ("Z", "vertical"), "lat": ("Y", "latitude"), "lon": ("X", "longitude")}


@functools.lru_cache(maxsize=256)
def conversion(stated: str, wanted: str) -> tuple[float, float] | None:
    """(scale, offset) from one unit to the other, in UDUNITS' or pint's spelling; None if there is none."""
    for spelling in (stated, stated.lower()):  # "Kelvin", "Pascals"
        try:
            zero, one = (float(registry.Quantity(value, spelling).to(wanted).magnitude) for value in (0.0, 1.0))
        except (pint.PintError, tokenize.TokenError, ValueError, TypeError, AttributeError, ZeroDivisionError):
            continue
        return one - zero, zero
    return None


def axis(dataset: xr.Dataset, ours: str) -> Hashable | None:
    """The dimension that is our axis `ours` by its coordinate's attributes (`axis`, `standard_name`, `units`)."""
    kind, coordinate = _AXES[ours]
    named = {*dataset.cf.axes.get(kind, ()), *dataset.cf.coordinates.get(coordinate, ())}
    found = [name for name in named if name in dataset.dims]
    return found[0] if len(found) == 1 else None


def of_quantity(dataset: xr.Dataset, standard_names: Iterable[str]) -> list[Hashable]:
    """Data variables whose `standard_name` is one of `standard_names`."""
    wanted = set(standard_names)
    return [name for name, array in dataset.data_vars.items() if array.attrs.get("standard_name") in wanted]


def middles(dataset: xr.Dataset) -> NDArray[np.float64] | None:
    """Middles of the cells of the time axis, in its unit: of the variable that its attribute `bounds` (or
    `climatology`) names; None where it names none.
    """
    time = dataset["time"]
    named = time.attrs.get("bounds", time.attrs.get("climatology"))
    if named is None or named not in dataset:
        return None
    bounds = np.asarray(dataset[named].values, np.float64)
    if bounds.shape != (time.size, 2) or not np.isfinite(bounds).all():
        return None
    return bounds.mean(axis=1)
