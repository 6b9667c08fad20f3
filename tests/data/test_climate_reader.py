"""Climate files of several models: names, units, directions, levels, regridding, months; what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from astrobiogen import data
from astrobiogen.datatools.climates import climate, grids, planets, variables

RNG = np.random.default_rng(0)


def grid(lat: np.ndarray, lon: np.ndarray) -> grids.Grid:
    return grids.Grid(np.array([0.5]), np.sort(lat)[::-1], np.sort(lon), 12)


def area_mean(field: np.ndarray, where: grids.Grid) -> np.ndarray:
    weights = np.abs(np.diff(np.sin(np.radians(grids.latitude_edges(where.latitudes)))))
    widths = np.diff(grids.longitude_edges(where.longitudes))
    return np.einsum("...ij,i,j->...", field, weights / weights.sum(), widths / widths.sum())


sizes = st.integers(4, 40)


@given(nlat=sizes, nlon=sizes, start=st.floats(0, 20), seed=st.integers(0, 99))
def test_regridding_keeps_constants_and_the_area_mean(nlat: int, nlon: int, start: float, seed: int) -> None:
    step = 180.0 / nlat
    source = grid(np.linspace(90 - step / 2, -90 + step / 2, nlat), (start + np.arange(nlon) * 360.0 / nlon) % 360.0)
    target = grids.standard_grid()
    field = np.random.default_rng(seed).normal(280.0, 30.0, (2, nlat, nlon))
    out = grids.regrid(field, source, target)
    assert out.shape == (2, 32, 64)
    np.testing.assert_allclose(grids.regrid(np.full_like(field, 7.5), source, target), 7.5, rtol=1e-12)
    np.testing.assert_allclose(area_mean(out, target), area_mean(field, source), rtol=1e-12)
    assert field.min() - 1e-9 <= out.min() <= out.max() <= field.max() + 1e-9


def test_regridding_of_fields_linear_in_area() -> None:
    fine = grid(np.linspace(89.5, -89.5, 180), np.arange(0.5, 360.0, 1.0))
    target = grids.standard_grid()
    means = {}
    for where in (fine, target):  # exact cell means of sin(latitude) and of cos(longitude)
        edges, turns = (
            np.sin(np.radians(grids.latitude_edges(where.latitudes))),
            np.radians(grids.longitude_edges(where.longitudes)),
        )
        rows = (edges[1:] + edges[:-1]) / 2
        columns = np.diff(np.sin(turns)) / np.diff(turns)
        means[where.latitudes.size] = rows[:, None] + columns[None]
    out = grids.regrid(means[180], fine, target)
    # first order: off by at most half a source cell's change, 0.5 * (1 degree in radians) for either factor
    assert np.abs(out - means[32]).max() < np.radians(1.0)
    # a cell made of whole source cells is exact
    coarse = grid(np.linspace(85, -85, 18), np.arange(5.0, 360.0, 10.0))
    again = grids.regrid(means[180], fine, coarse)
    assert area_mean(again, coarse) == pytest.approx(area_mean(means[180], fine), rel=1e-12)
    block = means[180][:10, :10]
    weights = np.abs(np.diff(np.sin(np.radians(grids.latitude_edges(fine.latitudes)))))[:10]
    assert again[0, 0] == pytest.approx((weights @ block).mean() / weights.sum(), rel=1e-12)


def test_same_grid_passes_unchanged() -> None:
    standard = grids.standard_grid()
    field = RNG.normal(size=(3, 32, 64))
    assert grids.regrid(field, standard, standard) is field


def test_level_interpolation_is_linear_in_the_logarithm() -> None:
    sigma = np.array([0.01, 0.1, 0.4, 1.0])
    target = np.array([0.005, 0.05, 0.2, 0.9])
    field = np.broadcast_to((2.0 + 3.0 * np.log(sigma))[None, :, None, None], (2, 4, 3, 5)).copy()
    out = grids.interpolate_levels(field, sigma, target)
    expected = 2.0 + 3.0 * np.log(np.maximum(target, 0.01))
    np.testing.assert_allclose(out, np.broadcast_to(expected[None, :, None, None], (2, 4, 3, 5)), rtol=1e-12)
    np.testing.assert_allclose(grids.interpolate_levels(field, sigma, sigma), field, rtol=1e-12)
    # below the ground: the lowest known value; a hole above is kept as one
    field[:, 3, 0, 0] = np.nan
    assert grids.interpolate_levels(field, sigma, target)[0, 3, 0, 0] == field[0, 2, 0, 0]
    field[:, 1, 0, 0] = np.nan
    assert np.isnan(grids.interpolate_levels(field, sigma, target)[0, 1, 0, 0])


@given(steps=st.integers(12, 400))
def test_time_bins_keep_the_mean(steps: int) -> None:
    matrix = grids.time_matrix(steps)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(matrix.mean(axis=0) * steps, 1.0, rtol=1e-9)


def test_calendar_months() -> None:
    matrix = grids.month_matrix(np.array([*range(1, 13), *range(1, 13)]))
    np.testing.assert_array_equal(matrix @ np.arange(24), np.arange(12) + 6.0)
    with pytest.raises(ValueError, match=r"\[12\]"):
        grids.month_matrix(np.arange(1, 12))


# ---- files ---------------------------------------------------------------------------------------------------------
def build(model: str, **changes: Any) -> xr.Dataset:
    """A file in the manner of ``model``; T falls with latitude, so that directions can be told."""
    names = {key: rule.names[model][0] for key, rule in variables.VARIABLES.items()}
    lat = np.linspace(-88.0, 88.0, 45) if model in ("ExoCAM", "UM", "ERA") else np.linspace(86.0, -86.0, 44)
    lon = np.arange(-180.0, 180.0, 5.0) if model == "ROCKE-3D" else np.arange(0.0, 360.0, 5.0)
    steps = changes.get("steps", 12)
    warmth = 300.0 - 0.3 * np.abs(lat - 10.0)[:, None] + 0.0 * lon
    if model == "ExoPlaSim":
        lev, lev_attrs = np.array(grids.STANDARD_SIGMA), {"units": "nondimensional"}
    elif model == "ExoCAM":
        lev, lev_attrs = np.array([50.0, 300.0, 600.0, 900.0]), {"units": "level"}
    else:
        lev, lev_attrs = np.array([925.0, 700.0, 300.0, 50.0]), {"units": "hPa"}
    shape = (steps, lev.size, lat.size, lon.size)
    kelvin = changes.get("kelvin", True)
    volume, surface = ("time", "lev", "lat", "lon"), ("time", "lat", "lon")
    fields: dict[str, Any] = {
        names["ta"]: (volume, np.broadcast_to(warmth - 273.15 * (not kelvin), shape).copy(),
                      {"units": "K" if kelvin else "C"}),
        names["hus"]: (volume, np.full(shape, 5.0), {"units": "g kg-1"}),
        names["ts"]: (surface, np.broadcast_to(warmth, (shape[0], *shape[2:])).copy(), {"units": "K"}),
        names["sic"]: (surface, np.full((shape[0], *shape[2:]), 25.0), {"units": "%"}),
        names["ps"]: (surface, np.full((shape[0], *shape[2:]), 1000.0), {"units": "hPa"}),
        names["rst"]: (surface, np.full((shape[0], *shape[2:]), 240.0), {"units": "W m-2"}),
        names["rlut"]: (surface, np.full((shape[0], *shape[2:]), 238.0 * (1 if model == "ExoCAM" else -1)),
                        {"units": "W/m2"}),
    }  # fmt: skip
    if model == "ExoCAM":
        fields |= {
            "hyam": ("lev", np.array([0.05, 0.1, 0.05, 0.0])),
            "hybm": ("lev", np.array([0.0, 0.2, 0.55, 0.9])),
            "P0": ((), 1e5),
        }
    coords = {"time": np.arange(float(steps)), "lev": ("lev", lev, lev_attrs), "lat": lat, "lon": lon}
    dataset = xr.Dataset(fields, coords, {"parameters": json.dumps({"flux": 900.0})})
    dates = {"UM": "days since 2000-01-01"}.get(model)
    if dates:
        dataset["time"] = ("time", np.arange(steps) * 30.4 + 15.0, {"units": dates, "calendar": "360_day"})
    axes = {"UM": {"lat": "latitude", "lon": "longitude"}, "ERA": {"lat": "latitude", "lon": "longitude"},
            "ROCKE-3D": {"lev": "plm"}}.get(model, {})  # fmt: skip
    return dataset.rename(axes)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("model", ["ExoPlaSim", "ROCKE-3D", "ExoCAM", "UM", "ERA"])
def test_files_of_five_models(tmp_path: Path, model: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    dataset = build(model, kelvin=model != "ROCKE-3D")
    if suffix == ".nc":
        dataset.to_netcdf(path, engine="netcdf4")
    else:
        dataset.to_zarr(path, consolidated=False)
    target = grids.standard_grid()
    found = climate.read_climate(path, ("ta", "hus", "ts", "sic"), target)
    assert found.fields["ta"].shape == (12, 10, 32, 64)
    assert found.fields["ts"].shape == (12, 32, 64)
    np.testing.assert_allclose(found.fields["hus"], 5e-3, rtol=1e-12)
    np.testing.assert_allclose(found.fields["sic"], 0.25, rtol=1e-12)
    warmth = 300.0 - 0.3 * np.abs(target.latitudes - 10.0)
    # a cell mean against the value at its centre: at most a cell of 5.6 and a source cell of 4 degrees, 0.3 K each
    assert np.abs(found.fields["ta"] - warmth[None, None, :, None]).max() < 1.5
    assert found.fields["ts"][0, 13:15].mean() > found.fields["ts"][0, 20].mean() > found.fields["ts"][0, 31].mean()
    assert found.toa_imbalance == pytest.approx(2.0)
    assert found.ts_mean == pytest.approx(area_mean(found.fields["ts"], target).mean(), abs=1e-9)
    assert found.parameters == {"flux": 900.0}


def test_months_and_folders_of_files(tmp_path: Path) -> None:
    build("ERA", steps=48).to_netcdf(tmp_path / "long.nc", engine="netcdf4")
    assert climate.read_climate(tmp_path / "long.nc", ("ts",)).fields["ts"].shape == (12, 45, 72)
    build("ERA", steps=4).to_netcdf(tmp_path / "short.nc", engine="netcdf4")
    with pytest.raises(data.DataError, match=r"\[time\]: 4 steps"):
        climate.read_climate(tmp_path / "short.nc", ("ts",))
    whole = build("ROCKE-3D")
    folder = tmp_path / "rocke"
    folder.mkdir()
    whole[["TempL", "SpHuL"]].to_netcdf(folder / "aijl.nc", engine="netcdf4")
    whole.drop_vars(["TempL", "SpHuL"]).to_netcdf(folder / "aij.nc", engine="netcdf4")
    found = climate.read_climate(folder, ("ta", "ts"), grids.standard_grid())
    assert set(found.fields) == {"ta", "ts"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("Q"), r"\[hus\]: variable absent"),
        (lambda d: d.assign(T=d["T"].assign_attrs(units="furlong")), r"\[T\]: units 'furlong'"),
        (lambda d: d.assign(T=d["T"].assign_attrs(units="C")), r"\[ta\]: values .* lie outside|values 5"),
        (lambda d: d.assign(T=d["T"].where(d["T"] < 299.0)), r"\[ta\]: \d+ values are NaN"),
        (lambda d: d.assign(T=d["T"].where(d["lev"] != 300.0, 0.0)), r"\[ta\]: values 0 to"),
        (lambda d: d.assign(Q=d["Q"] * 0.0), r"\[Q\]|\[hus\]: the lowest level is zero"),
        (lambda d: d.drop_vars("PS"), r"\[ps\]: surface pressure is needed"),
        (lambda d: d.rename(lat="y"), r"\[lat\]: coordinate absent|axes"),
        (lambda d: d.isel(lev=0), r"axes"),
        (lambda d: d.isel(lat=slice(0, 30)), r"\[lat\]: 30 values from .* do not cover the sphere"),
        (lambda d: d.isel(lat=[22]), r"\[lat\]: 1 values"),
        (lambda d: d.isel(lon=slice(10, 60)), r"\[lon\]: 50 values from .* do not cover the sphere"),
        (lambda d: d.assign_coords(lat=d["lat"] * 2.0), r"\[lat\]: values -?\d+ to \d+, expected degrees"),
        (lambda d: d.assign_attrs(parameters="{"), r"\[parameters\]: is not JSON"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    changed = change(build("ExoCAM"))
    if "Q" in changed and not changed["Q"].attrs:
        changed["Q"].attrs["units"] = "g kg-1"
    for name in ("T",):
        if name in changed and "units" not in changed[name].attrs:
            changed[name].attrs["units"] = "K"
    changed.to_netcdf(tmp_path / "bad.nc", engine="netcdf4")
    with pytest.raises(data.DataError, match=message) as caught:
        climate.read_climate(tmp_path / "bad.nc", ("ta", "hus"), grids.standard_grid())
    assert "bad.nc" in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    build("ExoPlaSim").to_netcdf(tmp_path / "good.nc", engine="netcdf4")
    raw = (tmp_path / "good.nc").read_bytes()
    for share in (0.05, 0.5, 0.9):
        (tmp_path / "cut.nc").write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(data.DataError, match="cut"):
            climate.read_climate(tmp_path / "cut.nc", ("ta", "hus", "ts", "sic"))
    with pytest.raises(data.DataError, match="is missing"):
        climate.read_climate(tmp_path / "none.nc", ("ta",))
    with pytest.raises(data.DataError, match="can't open HDF5 attribute"), climate.opened(tmp_path / "good.nc"):
        raise AttributeError("NetCDF: can't open HDF5 attribute")  # as netCDF4 does for one damaged byte
    with pytest.raises(AttributeError, match="a fault of ours"), climate.opened(tmp_path / "good.nc"):
        raise AttributeError("a fault of ours")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(data.DataError, match=r"empty\.zarr"):
        climate.read_climate(tmp_path / "empty.zarr", ("ta",))


# ---- the same levels in other words ----------------------------------------------------------------------------------
def sloped() -> xr.Dataset:
    """ExoCAM's file with a temperature that falls with height, so that a wrong level shows."""
    dataset = build("ExoCAM")
    profile = xr.DataArray([210.0, 235.0, 260.0, 290.0], dims="lev")
    return dataset.assign(T=(dataset["T"] * 0.0 + profile).assign_attrs(units="K"))


def of_echam(dataset: xr.Dataset) -> xr.Dataset:
    pressure = xr.Variable("nhym", dataset["hyam"].values * 1e5, {"units": "Pa"})
    return dataset.drop_vars(["P0", "hyam", "hybm"]).assign(
        hyam=pressure, hybm=xr.Variable("nhym", dataset["hybm"].values, {"units": "1"})
    )


def on_pressure(dataset: xr.Dataset) -> xr.Dataset:
    """On levels of air pressure, those of the hybrid ones at 1000 hPa; the coefficients of 26 model levels are kept."""
    levels = (dataset["hyam"].values + dataset["hybm"].values) * 1e5
    kept = {name: ("ilev", np.linspace(0.0, 1.0, 26)) for name in ("hyam", "hybm")}
    named = {"units": "Pa", "standard_name": "air_pressure"}
    return dataset.drop_vars(["hyam", "hybm"]).assign_coords(lev=("lev", levels, named)).assign(kept)


@pytest.mark.parametrize(
    ("write", "tolerance"),
    [
        (of_echam, 0.0),
        (lambda d: d.assign(P0=((), 1000.0, {"units": "hPa"})), 0.0),
        (lambda d: d.drop_vars("P0"), 0.0),
        (on_pressure, 1e-9),  # p / ps is divided once more
    ],
    ids=["hyam in Pa", "P0 in hPa", "no P0", "pressure levels that keep hyam"],
)
def test_the_same_levels_in_other_words_are_the_same_temperatures(tmp_path: Path, write: Any, tolerance: float) -> None:
    target = grids.standard_grid()
    sloped().to_netcdf(tmp_path / "base.nc", engine="netcdf4")
    write(sloped()).to_netcdf(tmp_path / "other.nc", engine="netcdf4")
    base, other = (climate.read_climate(tmp_path / n, ("ta",), target).fields["ta"] for n in ("base.nc", "other.nc"))
    assert np.ptp(base[:, :, 10, 10]) > 30.0
    np.testing.assert_allclose(other, base, rtol=0.0, atol=max(tolerance, 1e-9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.isel(lev=[3]), r"\[ta\]: 1 levels, expected at least 4"),
        (lambda d: on_pressure(d).isel(lev=[1, 2, 3]), r"\[ta\]: 3 levels"),
        (lambda d: on_pressure(d).assign_coords(lev=on_pressure(d)["lev"] / 100.0).assign_coords(
            lev=lambda e: e["lev"].assign_attrs(units="Pa", standard_name="air_pressure")),
         r"\[lev\]: the lowest level has p / p_surface 0.009"),
        (lambda d: d.assign(hyam=d["hyam"] * 1e5), r"\[hyam\]: values up to 1e\+04 with units ''"),
        (lambda d: d.assign(P0=((), 1000.0)), r"\[P0\]: is 1000 with units ''"),
    ],
)  # fmt: skip
def test_levels_that_would_be_made_up_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    change(sloped()).to_netcdf(tmp_path / "bad.nc", engine="netcdf4")
    with pytest.raises(data.DataError, match=message):
        climate.read_climate(tmp_path / "bad.nc", ("ta",), grids.standard_grid())


@pytest.mark.parametrize(
    ("name", "value"), [("flux", 1.0), ("radius", 6371.0), ("gravity", 980.0), ("pCO2", 400.0), ("startemp", 5.772)]
)
def test_parameters_in_other_units_are_refused(name: str, value: float) -> None:
    run = {"flux": 1361.0, "startemp": 5772.0, "radius": 1.0, "gravity": 9.8, "rotationperiod": 1.0, "aquaplanet": True,
           "pCO2": 4e-4}  # fmt: skip
    body = planets.Body("Earth", "Sun")
    assert planets.parameters(Path("x.nc"), "earth", body, run, {}, print)["gravity"] == 9.8
    with pytest.raises(data.DataError, match=rf"parameters.{name}\]: is {value}, expected"):
        planets.parameters(Path("x.nc"), "earth", body, run | {name: value}, {}, print)
