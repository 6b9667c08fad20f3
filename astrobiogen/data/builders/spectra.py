"""Virtual Planetary Laboratory albedo spectra on one wavelength grid."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError

WAVELENGTH_RANGE, BINS = (0.30, 2.40), 256  # micrometres; inside the range of both Earth spectra
# name -> (file, columns of wavelength and albedo); "modern_earth" is the quadrature spectrum of Robinson et al. 2011,
# its reflectance column.
LIBRARY: dict[str, tuple[str, int, int]] = {
    "modern_earth": ("earth_quadrature_radiance_refl.dat.gz", 0, 3),
    "archean_earth": ("ArcheanEarth_geo_albedo.txt.gz", 0, 1),
    "hazy_archean_earth": ("Hazy_ArcheanEarth_geo_albedo.txt.gz", 0, 1),
    "early_mars": ("EarlyMars_geo_albedo.txt.gz", 0, 1),
    "early_venus": ("EarlyVenus_geo_albedo.txt.gz", 0, 1),
    "mars": ("Mars_geo_albedo.txt.gz", 0, 1),
    "venus": ("Venus_geo_albedo.txt.gz", 0, 1),
    "jupiter": ("Jupiter_geo_albedo.txt.gz", 0, 1),
    "saturn": ("Saturn_geo_albedo.txt.gz", 0, 1),
    "uranus": ("Uranus_geo_albedo.txt.gz", 0, 1),
    "neptune": ("Neptune_geo_albedo.txt.gz", 0, 1),
}
# Which climate has which spectrum: the 3.0 Ga Earth (no O2, 50 mbar CO2) and today's. All others have none.
PAIRED = {("earth", 0): "archean_earth", ("earth", 2): "modern_earth"}


def wavelength_edges() -> NDArray[np.float64]:
    """Bin edges [257] in micrometres, equal in log wavelength (resolving power about 123)."""
    return np.geomspace(*WAVELENGTH_RANGE, BINS + 1)


def read_spectrum(folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bin-mean albedo [256] and a mask of the bins that hold at least one point.

    Raises
    ------
    DataError
        Unreadable or truncated file, too few columns, or non-finite albedo.
    """
    file, wave_column, albedo_column = LIBRARY[name]
    path = folder / file
    rows: list[list[float]] = []
    try:
        with gzip.open(path, "rt", encoding="ascii", errors="replace") as handle:
            for line in handle:
                parts = line.split()
                if parts and parts[0][0] in "0123456789.+-":
                    rows.append([float(p) for p in parts])
    except (OSError, EOFError, ValueError) as error:
        raise DataError(path, "", f"cannot be read ({error})") from error
    if not rows or len(rows[0]) <= albedo_column:
        raise DataError(path, "albedo", f"column {albedo_column} absent")
    table = np.array(rows)
    wave, albedo = table[:, wave_column], table[:, albedo_column]
    if not np.isfinite(albedo).all():
        raise DataError(path, "albedo", "holds non-finite values")
    place = np.digitize(wave, wavelength_edges()) - 1
    inside = (place >= 0) & (place < BINS)
    count = np.bincount(place[inside], minlength=BINS)
    total = np.bincount(place[inside], weights=albedo[inside], minlength=BINS)
    return (total / np.maximum(count, 1)).astype(np.float32), count > 0
