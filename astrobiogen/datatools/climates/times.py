"""The time axis of climate files: parts in several files, stamps and their cells, dates, twelve months."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cftime
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates import conventions, grids
from astrobiogen.datatools.climates.grids import Floats

_CALENDAR = "since"  # "days since 1850-01-01": time steps have dates
_FEBRUARY = 2


def as_one(path: Path, parts: list[xr.Dataset]) -> xr.Dataset:
    """Files of one climate: those with the same variables are parts of its time, the others are put side by side."""
    groups: dict[frozenset[str], list[xr.Dataset]] = {}
    for part in parts:
        held = frozenset(str(name) for name, array in part.data_vars.items() if "time" in array.dims)
        groups.setdefault(held, []).append(part)
    whole = [_in_time(path, group) if len(group) > 1 else group[0] for group in groups.values()]
    return xr.merge(whole, compat="override", join="exact", combine_attrs="drop_conflicts")


def _in_time(path: Path, parts: list[xr.Dataset]) -> xr.Dataset:
    """Parts of the time axis, one after the other by their dates, counted from the date of the first."""
    attributes = dict(parts[0]["time"].attrs)
    for part in parts:
        stated = str(part["time"].attrs.get("units", ""))
        if _CALENDAR not in stated:
            raise DataError(
                path, "time", f"units {stated!r} in one of several files of the same variables, expected dates"
            )
    dated = sorted((_since(part, attributes) for part in parts), key=lambda part: float(part["time"].values.min()))
    return xr.concat(dated, "time", data_vars="minimal", coords="minimal", compat="override", join="exact",
                     combine_attrs="drop_conflicts")  # fmt: skip


def _since(part: xr.Dataset, attributes: dict[str, Any]) -> xr.Dataset:
    """``part`` with its times, and their bounds, counted as ``attributes`` say."""
    time = part["time"]
    stated, wanted = str(time.attrs["units"]), str(attributes["units"])
    calendar = str(time.attrs.get("calendar", "standard"))
    if stated == wanted:
        return part

    def moved(values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(cftime.date2num(cftime.num2date(values, stated, calendar), wanted, calendar), np.float64)

    bounds = time.attrs.get("bounds")
    if bounds in part:
        part = part.assign({bounds: (part[bounds].dims, moved(part[bounds].values))})
    return part.assign_coords(time=("time", moved(time.values), attributes))


def dates(dataset: xr.Dataset, path: Path) -> xr.DataArray:
    """The time axis with the middles of its cells in place of stamps at one of their ends.

    Raises:
        DataError: Times are missing or occur twice; or all are the first instant of a month, from the second month on,
            with no bounds to say whether the month before or after is meant.
    """
    time = dataset["time"]
    values = np.asarray(time.values, np.float64)
    if not np.isfinite(values).all():
        raise DataError(path, "time", f"{int((~np.isfinite(values)).sum())} times are missing")
    if np.unique(values).size != values.size:
        raise DataError(path, "time", f"{values.size - np.unique(values).size} times occur twice")
    middle = conventions.middles(dataset)
    if middle is not None:
        return time.copy(data=middle)
    if _CALENDAR in str(time.attrs.get("units", "")):
        stamps = _decoded(time, path)
        firsts = [(stamp.day, stamp.hour, stamp.minute) == (1, 0, 0) for stamp in stamps]
        if all(firsts) and stamps[0].month == _FEBRUARY and len(stamps) % grids.MONTHS == 0:
            text = "all stamps are the first instant of a month, from February on, and there are no bounds"
            raise DataError(path, "time", f"{text}: are months stamped at their end? expected time bounds")
    return time


def _decoded(time: xr.DataArray, path: Path) -> NDArray[Any]:
    """The dates of ``time``."""
    try:
        return np.atleast_1d(
            cftime.num2date(time.values, str(time.attrs["units"]), str(time.attrs.get("calendar", "standard")))
        )
    except (ValueError, OverflowError) as error:
        raise DataError(path, "time", f"cannot be read as dates ({error})") from error


def to_months(values: Floats, time: xr.DataArray, path: Path) -> Floats:
    """Twelve parts: calendar months where the steps have dates, equal parts of the period where not; 12 undated steps
    pass unchanged.
    """
    steps = values.shape[0]
    if steps < grids.MONTHS:
        raise DataError(path, "time", f"{steps} steps, expected at least {grids.MONTHS}; months are never repeated")
    if _CALENDAR in str(time.attrs.get("units", "")):
        try:
            matrix = grids.month_matrix(np.array([date.month for date in _decoded(time, path)]))
        except ValueError as error:
            raise DataError(path, "time", f"cannot be binned into calendar months ({error})") from error
        if steps == grids.MONTHS and (matrix.argmax(axis=1) == np.arange(grids.MONTHS)).all():
            return values
    elif steps == grids.MONTHS:
        return values
    else:
        matrix = grids.time_matrix(steps)
    return np.tensordot(matrix, values, axes=1)
