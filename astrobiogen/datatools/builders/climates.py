"""Raw climates to packed cubes, label fields and table rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from astrobiogen.data import labels
from astrobiogen.data.climates import cubes
from astrobiogen.data.errors import DataError
from astrobiogen.data.storage import pack
from astrobiogen.data.storage.container import write_arrays
from astrobiogen.data.storage.tables import ClimateRow
from astrobiogen.datatools.builders import text
from astrobiogen.datatools.builders.work import Work
from astrobiogen.datatools.climates import climate, grids, planets
from astrobiogen.datatools.climates.planets import Body
from astrobiogen.datatools.progress import track

# <planet>_g<epoch>_<setting>_seg1, a netCDF file, a Zarr store or a folder of netCDF files
_NAME = re.compile(r"(?P<planet>[A-Za-z0-9-]+)_g(?P<epoch>\d)_(?P<setting>.+)_seg1(?P<suffix>\.(?i:nc4?|zarr)|)")
_INPUT, _LABEL = ("ta", "hus"), ("ts", "sic")


def _write(work: Work, key: str, first: climate.ClimateFile, second: climate.ClimateFile, common: dict) -> float:
    """Pack cube and label fields; returns the area mean of the label segment's surface temperature [K]."""
    codes = {"ta": cubes.quantise_ta(first.fields["ta"]), "hus": cubes.quantise_hus(first.fields["hus"])}
    work.codes[key] = codes
    notes = {
        "ta": {"units": "K", "step": cubes.TA_STEP, "meaning": "code * step"},
        "hus": {"units": "kg kg-1", "step": cubes.HUS_STEP, "meaning": "0, or 1e-7 * exp((code - 1) * step)"},
    }
    cube_attributes = {**common, "segment": cubes.INPUT_SEGMENT}
    write_arrays(work.output / f"climate/{key}.bin", codes, cube_attributes, notes, delta2=_INPUT)
    ts, sic = cubes.quantise_ts(second.fields["ts"]), cubes.quantise_sic(second.fields["sic"])
    notes = {
        "ts": {"units": "K", "step": cubes.TS_STEP},
        "sic": {"units": "1", "step": cubes.SIC_STEP, "rounding": "down"},
    }
    surface_attributes = {**common, "segment": cubes.LABEL_SEGMENT}
    write_arrays(work.output / f"surface/{key}.bin", {"ts": ts, "sic": sic}, surface_attributes, notes, delta2=_LABEL)
    weights = labels.latitude_weights(pack.latitude_bounds(first.grid.latitudes))
    return float((ts * cubes.TS_STEP).mean(axis=(0, 2)) @ weights)


@dataclass(frozen=True)
class RawClimate:
    """One climate as its two files say it is."""

    planet: str
    epoch: int
    setting: str
    body: Body
    first: climate.ClimateFile
    second: climate.ClimateFile
    later: Path
    parameters: dict[str, float]


@dataclass
class Tables:
    """What the raw folder's tables say of planets: by file prefix, in the catalogue, and in words."""

    bodies: dict[str, Body]
    catalogue: dict[str, dict[str, str]]
    notes: dict[str, str]


def read_raw(work: Work, path: Path, tables: Tables) -> RawClimate:
    """Both segments of the climate whose first is at ``path``, and its parameters.

    Raises:
        DataError: Its name, its planet, a file or a parameter is not as it must be.
    """
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise DataError(path, "", "name is not <planet>_g<epoch>_<setting>_seg1[.nc|.zarr]")
    if found["planet"] not in tables.bodies:
        raise DataError(path, "", f"planet {found['planet']!r} is unknown; name it in tables/planets.csv")
    body = tables.bodies[found["planet"]]
    later = path.with_name(path.name.replace("_seg1", "_seg2"))
    standard = grids.standard_grid()
    first, second = (climate.read_climate(p, names, standard) for p, names in ((path, _INPUT), (later, _LABEL)))

    def masked(error: DataError) -> None:
        work.blame(error, "masked")

    values = planets.parameters(path, found["planet"], body, first.parameters, tables.catalogue, masked)
    return RawClimate(found["planet"], int(found["epoch"]), found["setting"], body, first, second, later, values)


def read_tables(work: Work) -> Tables:
    """The tables of planets; a bad one masks what it would say."""
    tables = Tables(dict(planets.CATALOGUE), {}, {})
    own = work.raw / "tables/planets.csv"
    if own.exists():
        with work.tolerated("its planets are unknown"):
            tables.bodies |= planets.read_bodies(own)
    with work.tolerated("star mass, radius, metallicity, age and orbital period are masked"):
        tables.catalogue = planets.read_catalogue(work.raw / "tables/oec_planets.csv.gz")
    with work.tolerated("catalogue descriptions are masked"):
        path = work.raw / "text/oec_descriptions.jsonl.gz"
        for k, row in enumerate(text.read_jsonl(path, ("planet", "text"))):
            if row["text"].split():
                tables.notes[row["planet"]] = row["text"]
            else:
                work.blame(DataError(path, f"line {k + 1}, text", "holds no words"), "text masked")
    return tables


def climate_files(raw: Path) -> list[Path]:
    """First segments of the raw folder's climates, in whatever form; parameters beside them are none."""
    return sorted(p for p in (raw / "climate").glob("*_seg1*") if p.suffix != ".json")


def _one(work: Work, path: Path, run_id: int, tables: Tables) -> ClimateRow:
    found = read_raw(work, path, tables)
    if work.grid is None:
        work.grid = found.first.grid
    key = f"{found.planet}_g{found.epoch}"
    if key in work.codes:
        raise DataError(path, "", f"{key} was made from another file already")
    ts_label = _write(work, key, found.first, found.second, {"planet": found.planet, "epoch": found.epoch})
    work.record(f"climate/{key}.bin", path)
    work.record(f"surface/{key}.bin", found.later)
    body = found.body
    names = (body.name, body.star_system, *body.name.split(), "Proxima", "Kepler", "TRAPPIST")
    note = text.planet_note(tables.notes.get(body.name, ""), names)
    return ClimateRow(
        run_id=run_id,
        planet=found.planet,
        catalogue_name=body.name,
        star_system=body.star_system,
        epoch=found.epoch,
        setting=found.setting,
        cube_file=f"climate/{key}.bin",
        surface_file=f"surface/{key}.bin",
        toa_imbalance_input=found.first.toa_imbalance,
        toa_imbalance_label=found.second.toa_imbalance,
        lowest_ta_input=float(work.codes[key]["ta"][:, -1].mean() * cubes.TA_STEP),
        ts_input=found.first.ts_mean,
        ts_label=ts_label,
        params=tuple(found.parameters.values()),
        text=f"{planets.description(found.parameters)} {note}".strip(),
    )


def build_climates(work: Work) -> list[ClimateRow]:
    """Pack every climate that has both segments; a bad file costs its climate, a bad table masks what it would say."""
    tables = read_tables(work)
    done: list[ClimateRow] = []
    files = climate_files(work.raw)
    for path in track(files, "climates", len(files), lambda p: p.name):
        with work.tolerated("climate left out"):
            done.append(_one(work, path, len(done), tables))
    return done
