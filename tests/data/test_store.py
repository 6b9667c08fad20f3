"""The store of many climates: round trip, laziness, masks, acceptance, damage."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from astrobiogen import data
from astrobiogen.datatools.climates import grids
from astrobiogen.datatools.climates.store import ClimateStore, Entry, write_store

GRID = grids.Grid(np.array([0.2, 0.8]), np.array([45.0, 0.0, -45.0]), np.array([0.0, 90.0, 180.0, 270.0]), 12)
KEYS = ("earth_g0", "earth_g2", "mars_g0")


def entries(seed: int) -> list[Entry]:
    random = np.random.default_rng(seed)
    made = []
    for n, key in enumerate(KEYS):
        planet, epoch = key.split("_g")
        for segment in (1, 2):
            fields = {"ta": random.normal(280, 5, (12, 2, 3, 4)), "ts": random.normal(280, 5, (12, 3, 4))}
            made.append(Entry(planet, int(epoch), segment, fields, 1.5 * n, 0.1 * n if n else float("nan")))
    return made


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_round_trip_masks_and_acceptance(tmp_path: Path, suffix: str) -> None:
    path, made = tmp_path / f"climates{suffix}", entries(1)
    write_store(path, KEYS, ("ta", "ts", "sic"), GRID, made)
    with ClimateStore(path) as store:
        assert store.climates == KEYS
        for entry in made:
            found = store.read(f"{entry.planet}_g{entry.epoch}", entry.segment, ("ta", "ts"))
            for name, values in found.items():
                np.testing.assert_array_equal(values, entry.fields[name].astype(np.float32))
        cube, mask = store.history("earth", 2, ("ta",), 3)
        assert cube.shape == (1, 12, 3, 2, 3, 4)
        assert mask.tolist() == [True, False, True]
        assert not cube[:, :, 1].any()
        np.testing.assert_array_equal(cube[0, :, 0], made[0].fields["ta"].astype(np.float32))
        assert store.accepted() == KEYS
        assert store.accepted(max_toa_imbalance=2.0) == ("earth_g0", "earth_g2")
        assert store.accepted(max_drift=0.15) == ("earth_g2",)  # an unknown drift is not accepted
        with pytest.raises(data.DataError, match=r"earth_g0 segment 1 sic\]: absent"):
            store.read("earth_g0", 1, ("sic",))
        with pytest.raises(data.DataError, match="venus_g0"):
            store.history("venus", 0, ("ta",), 3)
    with pytest.raises(data.DataError, match="exists already"):
        write_store(path, KEYS, ("ta",), GRID, made)


def test_one_chunk_per_climate_and_segment_is_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "climates.zarr"
    write_store(path, KEYS, ("ta", "ts"), GRID, entries(2))
    chunks = sorted(p for p in (path / "ta" / "c").rglob("*") if p.is_file())
    assert len(chunks) == len(KEYS) * 2
    damaged = path / "ta" / "c" / "2" / "0" / "0" / "0" / "0" / "0"
    damaged.write_bytes(b"\x00" + damaged.read_bytes()[:20])
    with ClimateStore(path) as store:
        assert store.read("earth_g2", 1, ("ta",))["ta"].shape == (12, 2, 3, 4)
        with pytest.raises(data.DataError, match=r"mars_g0 segment 1 ta\]: damaged"):
            store.read("mars_g0", 1, ("ta",))
    with xr.open_zarr(path, consolidated=False, chunks=None) as plain:
        assert plain["ts"].dims == ("climate", "segment", "time", "lat", "lon")
        assert plain["ts"].attrs["units"] == "K"


def test_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "x.nc").write_bytes(b"<html>not found</html>")
    with pytest.raises(data.DataError, match=r"x\.nc: is not a climate store"):
        ClimateStore(tmp_path / "x.nc")
    with pytest.raises(data.DataError, match="is missing"):
        ClimateStore(tmp_path / "none.zarr")
    with pytest.raises(data.DataError, match=r"\.zarr or \.nc"):
        write_store(tmp_path / "x.hdf", KEYS, ("ta",), GRID, [])
    wrong = Entry("earth", 0, 1, {"ta": np.zeros((12, 1, 3, 4))})
    with pytest.raises(data.DataError, match=r"earth_g0 ta\]: shape"):
        write_store(tmp_path / "y.zarr", KEYS, ("ta",), GRID, [wrong])
