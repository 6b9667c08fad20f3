"""Albedo spectra of the Virtual Planetary Laboratory and the Planetary Spectrum Generator on one wavelength grid."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.datatools.files import unpacked

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

_PSG_UNITS = {"GENERATOR-RANGEUNIT": "um", "GENERATOR-RADUNITS": "rif"}
_PSG_MOST = 2**28  # numbers, or letters of texts with numbers, of one table
_PSG_ROWS = 64  # read at a time; a spectrum is a list of some thousand numbers
# words of a wavelength unit -> factor to micrometres
_LENGTHS = ((("um", "micron", "microns"), 1.0), (("nm",), 1e-3), (("A", "Angstrom", "Angstroms"), 1e-4))


def wavelength_edges() -> NDArray[np.float64]:
    """Bin edges [257] in micrometres, equal in log wavelength (resolving power about 123)."""
    return np.geomspace(*WAVELENGTH_RANGE, BINS + 1)


def read_spectrum(folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bin-mean albedo [256] and a mask of the bins that hold at least one point.

    Raises:
        DataError: Unreadable or truncated file, too few columns, or non-finite albedo.
    """
    file, wave_column, albedo_column = LIBRARY[name]
    path = folder / file
    lines = unpacked(path).decode("ascii", errors="replace").splitlines()
    parts = [line.split() for line in lines]
    try:
        rows = [[float(p) for p in part] for part in parts if part and part[0][0] in "0123456789.+-"]
    except ValueError as error:
        raise unreadable(path, error) from error
    if not rows or len(rows[0]) <= albedo_column or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(path, "albedo", f"column {albedo_column} absent or lines of different length")
    table = np.array(rows)
    return _binned(path, table[:, wave_column], table[:, albedo_column])


def _binned(
    path: Path | str, wave: NDArray[np.float64], albedo: NDArray[np.float64], where: str = ""
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if wave.shape != albedo.shape:
        raise DataError(path, f"{where}albedo", f"{albedo.size} values for {wave.size} wavelengths")
    if not np.isfinite(albedo).all() or not np.isfinite(wave).all():
        raise DataError(path, f"{where}albedo", "holds non-finite values")
    place = np.digitize(wave, wavelength_edges()) - 1
    inside = (place >= 0) & (place < BINS)
    if not inside.any():
        reach = f"{wave.min():.4g} to {wave.max():.4g} um"
        raise DataError(path, f"{where}wavelength", f"{reach}, none in {WAVELENGTH_RANGE}")
    count = np.bincount(place[inside], minlength=BINS)
    total = np.bincount(place[inside], weights=albedo[inside], minlength=BINS)
    return (total / np.maximum(count, 1)).astype(np.float32), count > 0


def read_psg(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bin-mean albedo [256] and mask from an answer of NASA's Planetary Spectrum Generator (text, ``.txt``).

    The header's ``# Spectral unit:`` must be a wavelength, ``# Radiance unit:`` the apparent albedo I/F (configuration
    ``<GENERATOR-RADUNITS>rif``), and the column ``Total`` is taken.

    Raises:
        DataError: Unreadable, an error message instead of a spectrum, another unit, or non-finite values.
    """
    return parse_psg(path, unpacked(path))


def parse_psg(path: Path | str, body: bytes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """``read_psg`` of the bytes of an answer; ``path`` is for messages."""
    lines = body.decode("utf-8", errors="replace").splitlines()
    notes = {
        k.strip("# ").lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line.startswith("#"))
    }
    header = next((line for line in lines if line.lower().startswith("# wave")), None)
    if header is None:
        raise DataError(path, "# Wave/freq", f"no such header line; the file begins with {lines[:1]}")
    unit, quantity = notes.get("spectral unit", ""), notes.get("radiance unit", "")
    scale = next((s for names, s in _LENGTHS if any(re.search(rf"\b{n}\b", unit) for n in names)), None)
    if scale is None:
        raise DataError(path, "Spectral unit", f"is {unit!r}, expected um, nm or Angstrom")
    if not re.search(r"\brif\b|I/F|albedo", quantity, re.IGNORECASE):
        raise DataError(path, "Radiance unit", f"is {quantity!r}, expected the apparent albedo I/F (rif)")
    names = header.lstrip("# ").split()
    if "Total" not in names:
        raise DataError(path, "Total", f"column absent; the columns are {names}")
    try:
        rows = [[float(p) for p in line.split()] for line in lines if line.strip() and not line.startswith("#")]
        table = np.array([[row[0], row[names.index("Total")]] for row in rows])
    except (ValueError, IndexError) as error:
        raise DataError(path, "", f"holds a line that is no row of numbers ({error})") from error
    if not len(table):
        raise DataError(path, "", "holds no rows")
    return _binned(path, table[:, 0] * scale, table[:, 1])


def read_psg_table(path: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Bin-mean albedo [256] and mask of every row of a Parquet table of PSG spectra, by ``<file name>:<row>``.

    One spectrum per row, as the geexhp project keeps them: a column that begins with "wave" [um] and one that begins
    with "albedo" or "total [i/f", each a list of numbers or a text of numbers with commas. Where the table has PSG's
    ``GENERATOR-RANGEUNIT`` and ``GENERATOR-RADUNITS``, they must be "um" and "rif" (apparent albedo). Needs
    ``pyarrow``.

    Raises:
        DataError: pyarrow is absent, the file is unreadable, a column is absent, or a row has another unit, lists of
            different length or values that are no finite numbers: names the row.
    """
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataError(path, "", "needs the package pyarrow: pip install 'astrobiogen[psg]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            wave = next((c for c in names if c.lower().startswith("wave")), None)
            albedo = next((c for c in names if c.lower().startswith(("albedo", "total [i/f"))), None)
            if wave is None or albedo is None:
                raise DataError(path, "wavelength, albedo", f"absent; the columns are {names[:8]}")
            units = [c for c in _PSG_UNITS if c in names]
            columns = _bounded_rows(file, [wave, albedo, *units])
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from them
        if isinstance(error, DataError):
            raise
        raise DataError(path, "", f"is not a Parquet table ({error})") from error
    found: dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
    for k, (x, y) in enumerate(zip(columns[wave], columns[albedo], strict=True)):
        for unit in units:
            if columns[unit][k] != _PSG_UNITS[unit]:
                raise DataError(path, f"row {k}, {unit}", f"is {columns[unit][k]!r}, expected {_PSG_UNITS[unit]!r}")
        place = f"row {k}"
        found[f"{path.stem}:{k}"] = _binned(path, _numbers(path, place, x), _numbers(path, place, y), f"{place}, ")
    return found


def _bounded_rows(file: Any, names: list[str]) -> dict[str, list[Any]]:
    """The columns ``names`` of a ``pyarrow.parquet.ParquetFile``, read a few rows at a time.

    Raises:
        ValueError: They hold more than ``_PSG_MOST`` numbers: values that repeat take no room in a file.
    """
    columns: dict[str, list[Any]] = {name: [] for name in names}
    held = 0
    for batch in file.iter_batches(_PSG_ROWS, columns=names):
        for name, values in batch.to_pydict().items():
            held += sum(len(value) for value in values if isinstance(value, (str, list)))
            columns[name] += values
        if held > _PSG_MOST:
            raise ValueError(f"holds more than {_PSG_MOST} numbers or letters: refused")
    return columns


def _numbers(path: Path, place: str, value: object) -> NDArray[np.float64]:
    """A list of numbers, or a text of them with commas."""
    try:
        return np.array(value.split(",") if isinstance(value, str) else value, np.float64).reshape(-1)
    except (ValueError, TypeError) as error:
        raise DataError(path, place, f"is no list of numbers ({error})") from error
