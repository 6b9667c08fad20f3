"""One climate as the files of different models and archives write it: the same values, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from astrobiogen import data
from astrobiogen.datatools.climates import climate, conventions, grids
from tests.data.test_climate_reader import build

FIELDS = ("ta", "hus", "ts", "sic")
MIDDLES = np.array([15, 45, 74, 105, 135, 166, 196, 227, 258, 288, 319, 349], float)
ENDS = np.cumsum([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]).astype(float)
NOLEAP = {"units": "days since 2001-01-01", "calendar": "noleap"}


def season() -> xr.Dataset:
    """A year in which months differ, stamped in their middle."""
    dataset = build("ERA")
    wave = xr.DataArray(10.0 * np.sin(np.arange(12) * np.pi / 6), dims="time")
    for name in ("t", "skt"):
        dataset[name] = (dataset[name] + wave).transpose(*dataset[name].dims).assign_attrs(dataset[name].attrs)
    return dataset.assign_coords(time=("time", MIDDLES, NOLEAP))


def of_cesm(dataset: xr.Dataset) -> xr.Dataset:
    """Stamps at the end of each month, with the cells' bounds."""
    bounds = np.stack([np.r_[0.0, ENDS[:-1]], ENDS], axis=1)
    stamped = dataset.assign_coords(time=("time", ENDS, {**NOLEAP, "bounds": "time_bnds"}))
    return stamped.assign(time_bnds=(("time", "nbnd"), bounds))


def renamed_axes(dataset: xr.Dataset) -> xr.Dataset:
    """Axes of no known name, told by their attributes."""
    changed = dataset.rename(latitude="south_north", longitude="west_east", lev="bottom_top", time="Times")
    for name, attributes in (
        ("south_north", {"standard_name": "latitude", "units": "degrees_north"}),
        ("west_east", {"axis": "X", "units": "degrees_east"}),
        ("bottom_top", {"axis": "Z", "units": "hPa"}),
        ("Times", {**NOLEAP, "axis": "T", "standard_name": "time"}),
    ):
        changed[name].attrs.update(attributes)
    return changed


def units(**words: str) -> Callable[[xr.Dataset], xr.Dataset]:
    return lambda dataset: dataset.assign({n: dataset[n].assign_attrs(units=u) for n, u in words.items()})


def of_cmip(dataset: xr.Dataset) -> xr.Dataset:
    """Variables of no known name, told by their standard names; sea ice is undefined over land."""
    changed = dataset.rename(t="tair", q="huss", skt="tsk", ci="ice", sp="psurf")
    for name, standard in (
        ("tair", "air_temperature"), ("huss", "specific_humidity"), ("tsk", "surface_temperature"),
        ("ice", "sea_ice_area_fraction"), ("psurf", "surface_air_pressure"),
    ):  # fmt: skip
        changed[name].attrs["standard_name"] = standard
    return changed


def with_land(dataset: xr.Dataset) -> xr.Dataset:
    land = (dataset["latitude"] > 20.0) & (dataset["longitude"] < 90.0)
    return dataset.assign(ci=dataset["ci"].where(~land).assign_attrs(dataset["ci"].attrs))


SAME: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "CESM, stamps at the end of a month": of_cesm,
    "CMIP, standard names": of_cmip,
    "WRF-like axes": renamed_axes,
    "capitals": lambda d: d.rename(latitude="LAT", longitude="Lon", lev="LEV"),
    "Kelvin": units(t="Kelvin", skt="degK"),
    "spelled out": units(sp="millibars", tsr="W m**-2", q="g/kg", ci="percent"),
    "two names, one meant": lambda d: d.assign(
        t=d["t"].assign_attrs(standard_name="air_temperature"), temp=d["t"] * 0.0
    ),
    "accumulated radiation": units(tsr="J m**-2"),
}


def read(dataset: xr.Dataset, path: Path) -> climate.ClimateFile:
    dataset.to_netcdf(path, engine="netcdf4")
    return climate.read_climate(path, FIELDS, grids.standard_grid())


@pytest.mark.parametrize("name", SAME)
def test_the_same_climate_in_other_words(tmp_path: Path, name: str) -> None:
    expected = read(season(), tmp_path / "base.nc")
    found = read(SAME[name](season()), tmp_path / "other.nc")
    for field, values in expected.fields.items():
        np.testing.assert_allclose(found.fields[field], values, rtol=1e-12, atol=1e-12, err_msg=field)
    if name == "accumulated radiation":
        assert np.isnan(found.toa_imbalance)  # over a time that the file does not state
    else:
        assert found.toa_imbalance == pytest.approx(expected.toa_imbalance)


def test_sea_ice_is_none_over_land(tmp_path: Path) -> None:
    found = read(with_land(season()), tmp_path / "land.nc").fields["sic"]
    assert found.min() == 0.0
    assert found.max() == pytest.approx(0.25)
    gaps = season()
    gaps["ci"] = gaps["ci"].where(gaps["time"] > 100.0).assign_attrs(gaps["ci"].attrs)
    with pytest.raises(data.DataError, match=r"\[sic\]: \d+ values are NaN"):
        read(gaps, tmp_path / "gaps.nc")


def test_a_folder_of_months_is_one_climate(tmp_path: Path) -> None:
    """Each file counts from the first day of its own month."""
    whole = of_cesm(season())
    expected = read(whole, tmp_path / "whole.nc")
    folder = tmp_path / "months"
    folder.mkdir()
    for month in range(12):
        part = whole.isel(time=[month])
        start = float(part["time_bnds"].values[0, 0])
        stamp = {"units": f"days since 2001-{month + 1:02d}-01", "calendar": "noleap", "bounds": "time_bnds"}
        part = part.assign(time_bnds=(("time", "nbnd"), part["time_bnds"].values - start))
        part = part.assign_coords(time=("time", part["time"].values - start, stamp))
        part.to_netcdf(folder / f"{(month * 5) % 12:02d}.{'nc4' if month % 2 else 'nc'}", engine="netcdf4")
    found = climate.read_climate(folder, FIELDS, grids.standard_grid())
    for field, values in expected.fields.items():
        np.testing.assert_allclose(found.fields[field], values, rtol=1e-12, err_msg=field)


def no_bounds(dataset: xr.Dataset) -> xr.Dataset:
    return of_cesm(dataset).drop_vars("time_bnds").assign_coords(time=("time", ENDS, NOLEAP))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_bounds, r"\[time\]: all stamps are the first instant of a month, from February on"),
        (
            lambda d: d.assign_coords(time=("time", np.r_[MIDDLES[:-1], MIDDLES[-2]], NOLEAP)),
            r"\[time\]: 1 times occur",
        ),
        (
            lambda d: d.assign_coords(time=("time", np.r_[MIDDLES[:-1], np.nan], NOLEAP)),
            r"\[time\]: 1 times are missing",
        ),
        (lambda d: d.assign(temp=d["t"] + 1.0), r"\[ta\]: the file holds \['t', 'temp'\]: which one is meant"),
        (lambda d: d.assign_coords(latitude=[f"{v:g}" for v in d["latitude"].values]), r"\[lat\]: values are of type"),
        (units(t="furlong"), r"\[t\]: units 'furlong', expected 'K'"),
        (units(t="J kg-1"), r"\[t\]: units 'J kg-1', expected 'K'"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        read(change(season()), tmp_path / "bad.nc")


@pytest.mark.parametrize(
    ("stated", "wanted", "expected"),
    [
        ("Kelvin", "K", (1.0, 0.0)), ("degree_Celsius", "K", (1.0, 273.15)), ("W m**-2", "W m-2", (1.0, 0.0)),
        ("hectopascal", "Pa", (100.0, 0.0)), ("kg kg**-1", "1", (1.0, 0.0)), ("m", "K", None), ("", "K", None),
        ("(", "K", None),
    ],
)  # fmt: skip
def test_units_convert_as_the_library_says(stated: str, wanted: str, expected: tuple[float, float] | None) -> None:
    found = conventions.conversion(stated, wanted)
    assert found == (pytest.approx(expected) if expected is not None else None)
