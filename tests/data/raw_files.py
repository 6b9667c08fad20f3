"""Raw files as a climate model and a reconstruction of a metabolism write them, small enough to be made in a test."""

import json

import numpy as np
import xarray as xr

from astrobiogen.datatools.climates import grids

GRID = grids.standard_grid()
VOLUME, SURFACE = ("time", "lev", "lat", "lon"), ("time", "lat", "lon")


def climate(warmth: float, segment: int) -> xr.Dataset:
    """A planet that is warm at the equator and a little warmer in the second segment."""
    lat, lon = np.radians(GRID.latitudes)[:, None], np.radians(GRID.longitudes)[None]
    season = np.sin(2 * np.pi * np.arange(12) / 12)[:, None, None]
    ts = 290.0 + warmth + segment - 45.0 * np.sin(lat) ** 2 + 5.0 * season * np.sin(lat) + 2.0 * np.cos(lon)
    ta = ts[:, None] - 70.0 * (1.0 - GRID.levels)[None, :, None, None]
    hus = 0.01 * np.exp((ta - 290.0) / 15.0)
    fields = {
        "ta": (VOLUME, ta, {"units": "K"}),
        "hus": (VOLUME, hus, {"units": "1"}),
        "ts": (SURFACE, ts, {"units": "K"}),
        "sic": (SURFACE, (ts < 271.0) * 0.9, {"units": "1"}),
        "rst": (SURFACE, np.full_like(ts, 240.0), {"units": "W m-2"}),
        "rlut": (SURFACE, np.full_like(ts, -241.0), {"units": "W m-2"}),
    }
    coords = {"time": np.arange(12.0), "lev": ("lev", GRID.levels, {"units": "1"}), "lat": GRID.latitudes,
              "lon": GRID.longitudes}  # fmt: skip
    parameters = {"flux": 900.0 + 20.0 * warmth, "startemp": 3000.0, "radius": 1.0, "gravity": 9.8,
                  "rotationperiod": 6.0, "aquaplanet": True, "synchronous": True, "pCO2": 0.01,
                  "pO2": 0.2 * (warmth > 0)}  # fmt: skip
    return xr.Dataset(fields, coords, {"parameters": json.dumps(parameters)})


def network(reactions: int, oxygen: bool, **changes: object) -> bytes:
    """A chain of reactions from a taken-up substance to a drained product, in cobra's JSON."""
    names = ["o2_e" if oxygen else "glc_e", *(f"m{k}_c" for k in range(reactions))]
    metabolites = [{"id": n, "name": n.split("_")[0], "compartment": n[-1], "formula": "C6H12O6"} for n in names]
    steps = [{"id": f"R{k}", "metabolites": {names[k]: -1.0, names[k + 1]: 1.0}, "lower_bound": 0.0,
              "upper_bound": 1000.0} for k in range(reactions)]  # fmt: skip
    steps.append({"id": "EX", "metabolites": {names[0]: -1.0}, "lower_bound": -10.0, "upper_bound": 1000.0})
    steps.append({"id": "out", "metabolites": {names[-1]: -1.0}, "lower_bound": 0.0, "upper_bound": 1000.0,
                  "objective_coefficient": 1.0})  # fmt: skip
    return json.dumps({"metabolites": metabolites, "reactions": steps, **changes}).encode()
