"""Planetary Spectrum Generator (NASA): a spectrum for a configuration file. NOT VERIFIED ONLINE.

https://psg.gsfc.nasa.gov/helpapi.php: the configuration is posted as ``file`` and the answer is a text table. Cite
Villanueva et al. 2018 (JQSRT 217, 86).
"""

from __future__ import annotations

from pathlib import Path

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.datatools.builders.spectra import parse_psg
from astrobiogen.datatools.fetch.download import Web, looks_like_a_page
from astrobiogen.datatools.fetch.each import Fetched, each

URL = "https://psg.gsfc.nasa.gov/api.php"
UNITS = "<GENERATOR-RADUNITS>"


def answer(path: Path) -> str:
    """Content check: a spectrum that ``build`` can read; a message of the service is quoted."""
    body = path.read_bytes()
    if b"# Wave" not in body and b"# WAVE" not in body:
        return looks_like_a_page(body) or f"holds no spectrum: {body[:120].decode('utf-8', errors='replace')!r}"
    try:
        parse_psg("answer", body)
    except DataError as error:
        return f"cannot be used: [{error.field}] {error.problem}"
    return ""


def configuration(path: Path) -> str:
    """Text of a PSG configuration that asks for the apparent albedo (``rif``), which the library's spectra are."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    units = next((line[len(UNITS) :].strip() for line in text.splitlines() if line.startswith(UNITS)), None)
    if units != "rif":
        raise DataError(path, UNITS, f"is {units!r}, expected 'rif' (apparent albedo)")
    return text


def fetch(raw: Path, web: Web, configurations: list[Path], url: str = URL) -> Fetched:
    """Write ``spectra/psg/<name>.txt`` for each configuration ``<name>.cfg``; name it ``<planet>_g<epoch>`` to pair
    the spectrum with that climate. A spectrum that is there is kept; a configuration that fails stops no other.
    """

    def one(config: Path) -> Path:
        path = raw / "spectra/psg" / f"{config.stem}.txt"
        web.save(url, path, answer, form={"type": "rad", "file": configuration(config)})
        return path

    return each(configurations, "psg", one)
