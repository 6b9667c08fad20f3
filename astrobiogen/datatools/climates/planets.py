"""Planet parameters of the climates: prescribed in the climate model, and measured (Open Exoplanet Catalogue)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.datatools.files import unpacked


class Body(NamedTuple):
    """A planet: its name in the Open Exoplanet Catalogue and its star system."""

    name: str
    star_system: str


# File prefix -> planet. Proxima is catalogued under Alpha Centauri.
CATALOGUE: dict[str, Body] = {
    "earth": Body("Earth", "Sun"),
    "proximab": Body("Proxima Centauri b", "Alpha Centauri"),
    "teegardenb": Body("Teegarden's Star b", "Teegarden's Star"),
    "trappist1e": Body("TRAPPIST-1 e", "TRAPPIST-1"),
    "trappist1f": Body("TRAPPIST-1 f", "TRAPPIST-1"),
    "toi700d": Body("TOI-700 d", "TOI-700"),
    "kepler1649c": Body("Kepler-1649 c", "Kepler-1649"),
    "kepler442b": Body("Kepler-442 b", "Kepler-442"),
    "kepler62f": Body("Kepler-62 f", "Kepler-62"),
    "wolf1069b": Body("Wolf 1069 b", "Wolf 1069"),
    "toi715b": Body("TOI-715 b", "TOI-715"),
    "lhs1140b": Body("LHS 1140 b", "LHS 1140"),
    "lp8909c": Body("LP 890-9 c", "LP 890-9"),
    "gj273b": Body("GJ 273 b", "GJ 273"),
    "ross128b": Body("Ross 128 b", "Ross 128"),
}
# The Sun and Earth by IAU 2015 nominal values; the age is the climate's own.
_SUN = {"st_mass_sun": 1.0, "st_rad_sun": 1.0, "st_met": 0.0, "pl_period_d": 365.25}
PARAM_NAMES = (
    "stellar_flux",
    "star_temperature",
    "star_mass",
    "star_radius",
    "star_metallicity",
    "star_age",
    "planet_radius",
    "gravity",
    "log10_rotation_period",
    "synchronous",
    "log10_orbital_period",
    "has_land",
    "p_o2",
    "log10_p_co2",
)
PARAM_UNITS = (
    "W m-2",
    "K",
    "M_sun",
    "R_sun",
    "dex",
    "Gyr",
    "R_earth",
    "m s-2",
    "log10 d",
    "1",
    "log10 d",
    "1",
    "bar",
    "log10 bar",
)


# What a run's parameter may be, in its unit: wider than any rocky planet that climate models run, narrower than the
# same number in another unit (a flux in solar constants, a radius in km, a gravity in cm s-2, CO2 in ppm).
RANGES: dict[str, tuple[float, float, str]] = {
    "flux": (10.0, 1e5, "W m-2"),
    "startemp": (1000.0, 60000.0, "K"),
    "radius": (0.1, 10.0, "Earth radii"),
    "gravity": (0.1, 100.0, "m s-2"),
    "rotationperiod": (0.01, 1e5, "d"),
    "pCO2": (1e-12, 200.0, "bar"),
    "pO2": (0.0, 200.0, "bar"),
    "geological_age_gyr": (0.0, 14.0, "Gyr"),
}


def _rows(path: Path, columns: set[str], what: str) -> list[dict[str, str]]:
    """Rows of a CSV (``.gz`` too) that must have ``columns``."""
    body = unpacked(path)
    try:
        rows = list(csv.DictReader(io.StringIO(body.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, error) from error
    if not rows or not columns <= set(rows[0]):
        header = list(rows[0])[:5] if rows else []
        raise DataError(path, "header", f"is not {what} (needs {sorted(columns)}, has {header})")
    return rows


def read_catalogue(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the catalogue by planet name; an error page saved as CSV is refused by its header."""
    return {row["name"]: row for row in _rows(path, {"name", "system", "st_teff_k"}, "the planet catalogue")}


def read_bodies(path: Path) -> dict[str, Body]:
    """Planets of a user's own by file prefix: a CSV with the columns prefix, name, star_system."""
    rows = _rows(path, {"prefix", "name", "star_system"}, "a table of planets")
    return {row["prefix"]: Body(row["name"], row["star_system"]) for row in rows}


def _catalogued(path: Path, row: Mapping[str, Any], column: str, masked: Callable[[DataError], None]) -> float:
    """Number of the catalogue; NaN where it states none, and where what it states is impossible, which ``masked``
    hears of.
    """
    value = row.get(column)
    if value in ("", None):
        return math.nan
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (number <= 0 and column != "st_met"):
        masked(DataError(path, f"catalogue, {column}", f"is {value!r}, expected a positive number"))
        return math.nan
    return number


def _given(path: Path, run: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Number of the climate model's parameters, within `RANGES`; where there is a default it may be absent."""
    if default is not None and name not in run:
        return default
    value = run.get(name)
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    low, high, unit = RANGES[name]
    if not low <= number <= high:
        raise DataError(path, f"parameters.{name}", f"is {value!r}, expected {low:g} to {high:g} {unit}")
    return number


def _told(path: Path, run: Mapping[str, Any], name: str, default: bool | None = None) -> bool:
    """True or false (1 or 0) of the climate model's parameters."""
    value = run.get(name, default)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise DataError(path, f"parameters.{name}", f"is {value!r}, expected true or false")
    return bool(value)


def parameters(
    path: Path,
    prefix: str,
    body: Body,
    run: Mapping[str, Any],
    catalogue: Mapping[str, Mapping[str, str]],
    masked: Callable[[DataError], None],
) -> dict[str, float]:
    """The P parameters of one climate in the order ``PARAM_NAMES``; NaN where not measured.

    Args:
        path: The climate's file, for messages.
        prefix, body: File prefix and planet.
        run: The climate model's parameters (file attribute): flux [W/m2], startemp [K], radius [Earth radii], gravity
            [m/s2], rotationperiod [d], aquaplanet, pCO2 [bar]; optional synchronous, pO2 [bar], geological_age_gyr.
        catalogue: Rows of the Open Exoplanet Catalogue by name.
        masked: Told of a value of the catalogue that is no possible number.

    Raises:
        DataError: A parameter of the run is absent, no number, or outside `RANGES`.
    """

    given, told = partial(_given, path, run), partial(_told, path, run)
    row: Mapping[str, Any] = _SUN if prefix == "earth" else catalogue.get(body.name, {})
    mass, radius, metallicity, age, period = (
        _catalogued(path, row, c, masked) for c in ("st_mass_sun", "st_rad_sun", "st_met", "st_age_gyr", "pl_period_d")
    )
    values = (
        given("flux"),
        given("startemp"),
        mass,
        radius,
        metallicity,
        given("geological_age_gyr", default=age),
        given("radius"),
        given("gravity"),
        math.log10(given("rotationperiod")),
        told("synchronous", default=False),
        math.log10(period),
        not told("aquaplanet"),
        given("pO2", default=0.0),
        math.log10(given("pCO2")),
    )
    return dict(zip(PARAM_NAMES, map(float, values), strict=True))


def description(values: dict[str, float]) -> str:
    """Text from the parameters alone: no name, no temperature of the planet, no judgement."""

    def stated(name: str, form: str) -> str:
        return form.format(values[name]) if math.isfinite(values[name]) else ""

    parts = [
        f"A rocky planet of {values['planet_radius']:.2f} Earth radii with surface gravity"
        f" {values['gravity']:.1f} m/s2",
        f"orbits a star of {values['star_temperature']:.0f} K"
        + stated("star_mass", ", {:.2f} solar masses")
        + stated("star_age", ", {:.1f} Gyr old"),
        f"every {10 ** values['log10_orbital_period']:.1f} days"
        if math.isfinite(values["log10_orbital_period"])
        else "",
        f"and receives {values['stellar_flux']:.0f} W/m2.",
        "It always shows the same side to its star."
        if values["synchronous"]
        else f"It turns once in {10 ** values['log10_rotation_period']:.1f} days.",
        "Continents and oceans cover it." if values["has_land"] else "An ocean covers all of it.",
        f"The air is mostly nitrogen with {1000 * 10 ** values['log10_p_co2']:.2g} mbar of carbon dioxide",
        f"and {1000 * values['p_o2']:.3g} mbar of oxygen." if values["p_o2"] else "and no oxygen.",
    ]
    return " ".join(part for part in parts if part)
