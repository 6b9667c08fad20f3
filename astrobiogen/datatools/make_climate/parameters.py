"""Parameters of a run from the planet catalogue, by one documented rule.

* luminosity L = R*^2 (T / 5772 K)^4, semi-major axis a = (M* (P / 365.25 d)^2)^(1/3), flux S = 1361 W/m2 L / a^2;
* a missing radius or mass follows from the other: R = M^0.279 in Earth units (Chen and Kipping 2017, rocky branch), and
  its inverse; a minimum mass counts as the mass; a mass above that of an iron planet of the radius is an upper limit
  and counts as missing (LP 890-9 c: 25 Earth masses at 1.37 Earth radii in the catalogue);
* synchronous rotation where P < 60 d, else a day of 24 hours;
* an aquaplanet with 1 bar of N2, the CO2 that is asked for, no O2, circular orbit, no obliquity.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates.planets import CATALOGUE, Body

SOLAR_CONSTANT, SUN_TEMPERATURE, YEAR = 1361.0, 5772.0, 365.25  # W/m2, K (IAU 2015), d
JUPITER_RADIUS, JUPITER_MASS = 11.209, 317.83  # in Earth's
STANDARD_GRAVITY = 9.80665  # m/s2
RADIUS_EXPONENT = 0.279
# R = 0.86 M^(1/3.7) in Earth units: Zeng, Sasselov and Jacobsen 2016 (ApJ 819, 127) at a core mass fraction of 1
IRON_RADIUS, IRON_EXPONENT = 0.86, 1.0 / 3.7
SYNCHRONOUS_BELOW = 60.0  # d
LARGEST_RADIUS = 2.0  # Earth radii; beyond it the planet is hardly rocky
COLDEST_STAR, HOTTEST_STAR = 2300.0, 7200.0  # K


@dataclass(frozen=True)
class Climate:
    """One run: file prefix, planet, epoch number, and the arguments for ExoPlaSim."""

    prefix: str
    body: Body
    epoch: int
    setting: str
    parameters: dict[str, Any]

    @property
    def key(self) -> str:
        """``<prefix>_g<epoch>_<setting>``: the file name without segment."""
        return f"{self.prefix}_g{self.epoch}_{self.setting}"


def prefix_of(name: str) -> str:
    """File prefix of a planet: the one in use, or the letters and digits of its name in lower case."""
    known = {body.name: prefix for prefix, body in CATALOGUE.items()}
    return known.get(name) or re.sub(r"[^a-z0-9]", "", name.lower())


def _known(path: Path, row: dict[str, str], column: str) -> float:
    try:
        value = float(row.get(column) or "nan")
    except ValueError as error:
        raise DataError(path, f"{row['name']}, {column}", f"is {row[column]!r}, expected a number") from error
    if not math.isfinite(value) or value <= 0:
        raise DataError(path, f"{row['name']}, {column}", "is not in the catalogue; the rule needs it")
    return value


def size(path: Path, row: dict[str, str]) -> tuple[float, float]:
    """Radius and mass in Earth's."""
    radius, mass = (float(row.get(c) or "nan") for c in ("pl_rad_jup", "pl_mass_jup"))
    radius, mass = radius * JUPITER_RADIUS, mass * JUPITER_MASS
    if math.isnan(radius) and math.isnan(mass):
        raise DataError(path, f"{row['name']}, pl_rad_jup", "neither radius nor mass is in the catalogue")
    if mass > (radius / IRON_RADIUS) ** (1.0 / IRON_EXPONENT):
        mass = math.nan
    if math.isnan(radius):
        radius = mass**RADIUS_EXPONENT
    if math.isnan(mass):
        mass = radius ** (1.0 / RADIUS_EXPONENT)
    return radius, mass


def climate_of(path: Path, row: dict[str, str], epoch: int, p_co2: float) -> Climate:
    """The run of one catalogue planet with ``p_co2`` [bar] of CO2.

    Raises:
        DataError: The catalogue lacks a value that the rule needs, or the planet is outside what the model is made for.
    """
    temperature, star_radius, star_mass, period = (
        _known(path, row, c) for c in ("st_teff_k", "st_rad_sun", "st_mass_sun", "pl_period_d")
    )
    radius, mass = size(path, row)
    if radius > LARGEST_RADIUS:
        raise DataError(path, row["name"], f"radius {radius:.2f} of Earth's is above {LARGEST_RADIUS}: hardly rocky")
    if not COLDEST_STAR <= temperature <= HOTTEST_STAR:
        raise DataError(path, row["name"], f"star of {temperature:.0f} K, expected {COLDEST_STAR} to {HOTTEST_STAR} K")
    axis = (star_mass * (period / YEAR) ** 2) ** (1.0 / 3.0)
    luminosity = star_radius**2 * (temperature / SUN_TEMPERATURE) ** 4
    synchronous = period < SYNCHRONOUS_BELOW
    parameters = {
        "startemp": temperature,
        "flux": round(SOLAR_CONSTANT * luminosity / axis**2, 1),
        "rotationperiod": period if synchronous else 1.0,
        "radius": round(radius, 3),
        "gravity": round(STANDARD_GRAVITY * mass / radius**2, 3),
        "eccentricity": 0.0,
        "obliquity": 0.0,
        "fixedorbit": True,
        "synchronous": synchronous,
        "aquaplanet": True,
        "ozone": False,
        "pN2": 1.0,
        "pCO2": p_co2,
    }
    body = Body(row["name"], row.get("system") or row["name"])
    known = CATALOGUE.get(prefix_of(row["name"]))
    return Climate(prefix_of(row["name"]), known or body, epoch, f"pCO2_{p_co2:g}bar", parameters)
