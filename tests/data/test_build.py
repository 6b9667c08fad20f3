"""Builders on small hand-made raw files: what is read, what is refused."""

import contextlib
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from astrobiogen import data
from astrobiogen.data.networks import features
from astrobiogen.datatools.builders import text
from astrobiogen.datatools.climates import climate, planets
from astrobiogen.datatools.networks import chemistry, cobra_json, fba, sbml

SBML = """<?xml version="1.0" encoding="UTF-8"?>
<sbml xmlns="http://www.sbml.org/sbml/level2" level="2" version="1"><model id="toy">
<listOfCompartments><compartment id="c" name="Cytosol"/><compartment id="e" name="Extracellular"/></listOfCompartments>
<listOfSpecies><species id="M_o2_e" name="O2" compartment="e"/><species id="M_o2_c" name="O2" compartment="c"/>
<species id="M_x_c" name="x" compartment="c" charge="-2"/></listOfSpecies>
<listOfReactions>{reactions}</listOfReactions></model></sbml>"""


def reaction(name: str, left: str, right: str, low: float, high: float, goal: float = 0.0) -> str:
    def side(tag: str, species: str) -> str:
        return f'<{tag}><speciesReference species="{species}" stoichiometry="1"/></{tag}>' if species else ""

    values = {"LOWER_BOUND": low, "UPPER_BOUND": high, "OBJECTIVE_COEFFICIENT": goal}
    law = "".join(f'<parameter id="{k}" value="{v}"/>' for k, v in values.items())
    return (
        f'<reaction id="{name}" reversible="{str(low < 0).lower()}">{side("listOfReactants", left)}'
        f'{side("listOfProducts", right)}<kineticLaw><math xmlns="http://www.w3.org/1998/Math/MathML"><ci>v</ci></math>'
        f"<listOfParameters>{law}</listOfParameters></kineticLaw></reaction>"
    )


def toy(unknown: str = "M_o2_c") -> str:
    parts = (
        reaction("R_EX_o2", "M_o2_e", "", -5, 1000),
        reaction("R_O2t", "M_o2_e", "M_o2_c", 0, 1000),
        reaction("R_make", unknown, "M_x_c", 0, 1000),
        reaction("R_growth", "M_x_c", "", 0, 1000, goal=1.0),
    )
    return SBML.format(reactions="".join(parts))


def test_network_and_flux_balance(tmp_path: Path) -> None:
    path = tmp_path / "toy.xml.gz"
    path.write_bytes(gzip.compress(toy().encode()))
    network = sbml.read_network(path)
    assert (network.metabolites, network.lower.size, network.stoichiometry.size) == (3, 4, 6)
    assert network.exchange_gas[0] == features.GASES.index("o2") + 1
    assert fba.growth(network) == pytest.approx(5.0)
    assert fba.growth(network, ("o2",)) == pytest.approx(0.0)
    assert network.columns.charge[2] == -2


def test_bad_sbml_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(toy().encode())
    cases = {
        "cut.xml.gz": (whole[: len(whole) // 2], "cannot be read"),
        "page.xml": (b"<html>404 not found</html>", "not SBML"),
        "zip.xml": (b"PK\x03\x04rest", "zip"),
        "unknown.xml": (toy("M_nowhere").encode(), "unknown species"),
        "empty.xml": (SBML.format(reactions="").encode(), "empty network"),
    }
    for name, (raw, message) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(data.DataError, match=message):
            sbml.read_network(tmp_path / name)


def write_climate(path: Path, **changes: object) -> None:
    lat, lon, lev = np.linspace(85, -85, 4), np.arange(0.0, 360.0, 90.0), np.array([0.1, 0.3, 0.6, 0.9])
    dims = ("time", "lev", "lat", "lon")
    ta = changes.get("ta", np.full((12, 4, 4, 4), 280.0))
    fields = {
        "ta": (dims, ta, {"units": changes.get("units", "K")}),
        "hus": (dims, np.full((12, 4, 4, 4), 0.01), {"units": "1"}),
        "rst": (("time", "lat", "lon"), np.full((12, 4, 4), 240.0), {"units": "W m-2"}),
        "rlut": (("time", "lat", "lon"), np.full((12, 4, 4), -239.0), {"units": "W m-2"}),
    }
    fields.pop(str(changes.get("drop", "")), None)
    coordinates = {"time": np.arange(12.0), "lev": lev, "lat": lat[::-1], "lon": lon}
    xr.Dataset(fields, coordinates, {"parameters": "{}"}).to_netcdf(path, engine="netcdf4")


def test_climate_reader(tmp_path: Path) -> None:
    write_climate(tmp_path / "good.nc")
    found = climate.read_climate(tmp_path / "good.nc", ("ta", "hus"))
    assert found.grid.latitudes[0] > found.grid.latitudes[-1]  # turned to north first
    assert found.toa_imbalance == pytest.approx(1.0)
    hole = np.full((12, 4, 4, 4), 280.0)
    hole[3, 1, 2, 0] = np.nan
    for name, changes, message in (
        ("units.nc", {"units": "furlong"}, r"\[ta\]: units 'furlong'"),
        ("nan.nc", {"ta": hole}, r"\[ta\]: 1 values are NaN"),
        ("cold.nc", {"ta": np.zeros((12, 4, 4, 4))}, r"\[ta\]: values 0"),
        ("none.nc", {"drop": "hus"}, r"\[hus\]: variable absent"),
    ):
        write_climate(tmp_path / name, **changes)
        with pytest.raises(data.DataError, match=message):
            climate.read_climate(tmp_path / name, ("ta", "hus"))
    (tmp_path / "cut.nc").write_bytes((tmp_path / "good.nc").read_bytes()[:3000])
    with pytest.raises(data.DataError, match="cut"):
        climate.read_climate(tmp_path / "cut.nc", ("ta", "hus"))


def test_error_page_saved_as_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "planets.csv.gz"
    path.write_bytes(gzip.compress(b"ERROR\nservice unavailable\n"))
    with pytest.raises(data.DataError, match="not the planet catalogue"):
        planets.read_catalogue(path)


@pytest.mark.parametrize(
    ("identifier", "name", "gas"),
    [
        ("M_o2_e", "", 1),
        ("M_O2xt", "", 1),
        ("S76", "oxygen_ex", 1),
        ("M_505", "O(2)ext", 1),
        ("M_O2e_c", "", 1),
        ("M_h2o_c", "H2O", 0),
    ],
)
def test_gas_spellings(identifier: str, name: str, gas: int) -> None:
    assert chemistry.gas_code(chemistry.spellings(identifier, name)) == gas


def test_formulas() -> None:
    assert chemistry.parse_formula("C6H12O6") == ([6, 12, 0, 6, 0, 0, 0, 0], True)
    assert chemistry.parse_formula("C6H12R")[1] is False
    assert chemistry.parse_formula("")[1] is False


RUN = {"flux": 900.0, "startemp": 3000.0, "radius": 1.0, "gravity": 9.8, "rotationperiod": 6.0, "aquaplanet": True,
       "pCO2": 0.01}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("flux", "900"), ("flux", True), ("flux", float("nan")), ("radius", 0), ("pCO2", None), ("gravity", float("inf")),
     ("pO2", "little"), ("pO2", -0.1), ("geological_age_gyr", []), ("synchronous", "yes"), ("aquaplanet", None)],
)  # fmt: skip
def test_impossible_parameters_of_a_run_are_refused(name: str, value: object) -> None:
    body = planets.Body("X b", "X")
    with pytest.raises(data.DataError, match=rf"\[parameters\.{name}\]: is {re.escape(repr(value))}, expected"):
        planets.parameters(Path("x.nc"), "x", body, {**RUN, name: value}, {}, pytest.fail)


def test_impossible_numbers_of_the_catalogue_are_masked() -> None:
    body, told = planets.Body("X b", "X"), []
    row = {"st_mass_sun": "0.5", "st_rad_sun": "-1", "st_met": "-0.3", "st_age_gyr": "old", "pl_period_d": "0"}
    found = planets.parameters(Path("x.nc"), "x", body, {**RUN, "pO2": 0}, {"X b": row}, told.append)
    assert (found["star_mass"], found["star_metallicity"], found["p_o2"]) == (0.5, -0.3, 0.0)
    masked = ("star_radius", "star_age", "log10_orbital_period")
    assert all(np.isnan(found[name]) for name in masked)
    assert [error.field for error in told] == [f"catalogue, {c}" for c in ("st_rad_sun", "st_age_gyr", "pl_period_d")]


def test_lines_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    for lines, message in (('{"text": "a"}\n5\n', "line 2.*is a int"), ('{"text": 1}\n', "line 1.*lacks the text"),
                           ('{"text": "a"}\n\n{"text": "b"}\n', "line 2.*is not JSON")):  # fmt: skip
        path.write_bytes(gzip.compress(lines.encode()))
        with pytest.raises(data.DataError, match=message):
            text.read_jsonl(path, ("text",))


@pytest.mark.parametrize(("charge", "known"), [(-2, True), ("abc", False), (None, False), (0.5, False), (1e9, False)])
def test_charges_that_cannot_be_are_masked(tmp_path: Path, charge: object, known: bool) -> None:
    metabolites = [{"id": "a_c", "compartment": "c", "charge": charge, "formula": "??"}]
    reactions = [{"id": "EX", "metabolites": {"a_c": -1.0}, "lower_bound": 0.0, "upper_bound": 1.0}]
    (tmp_path / "x.json").write_text(json.dumps({"metabolites": metabolites, "reactions": reactions}))
    columns = cobra_json.read_network(tmp_path / "x.json").columns
    assert bool(features.has(columns, features.CHARGE)[0]) == known
    assert not features.has(columns, features.FORMULA)[0]
    assert columns.charge[0] == (-2 if known else 0)


@settings(deadline=None, max_examples=50)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_archives_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    lines = "".join(json.dumps({"text": f"{k} word " * 20}) + "\n" for k in range(40))
    raw = bytearray(gzip.compress(lines.encode(), mtime=0))
    place %= len(raw)
    raw = raw[:place] if cut else raw[:place] + bytes([byte]) + raw[place + 1 :]
    path = tmp_path_factory.mktemp("gz") / "x.gz"
    path.write_bytes(raw)
    records = None
    with contextlib.suppress(data.DataError):
        records = text.read_jsonl(path, ("text",))
    expected = [json.loads(line)["text"] for line in lines.splitlines()]
    # read although a byte is another: one of the header, which the checksum leaves out
    assert records is None or [record["text"] for record in records] == expected
    for read in (planets.read_catalogue, sbml.read_network, cobra_json.read_network):
        with pytest.raises(data.DataError, match=r"x\.gz"):  # it holds none of these, damaged or not
            read(path)
