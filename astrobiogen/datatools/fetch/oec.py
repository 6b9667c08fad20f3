"""Open Exoplanet Catalogue: all systems in one XML file, to the planet table and the descriptions.

Source: https://github.com/OpenExoplanetCatalogue/oec_gzip (MIT-style licence; publications must cite it). Units of the
catalogue: Jupiter radii and masses, days, AU, solar masses and radii, K, dex, Gyr, pc. NOT VERIFIED ONLINE.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from astrobiogen.data.errors import DataError
from astrobiogen.data.storage.guarded import GZIP, gunzip, xml_problem
from astrobiogen.datatools.fetch.download import Web, keep, looks_like_a_page

URL = "https://github.com/OpenExoplanetCatalogue/oec_gzip/raw/master/systems.xml.gz"
COLUMNS: tuple[str, ...] = (
    "name", "system", "distance_pc", "st_teff_k", "st_mass_sun", "st_rad_sun", "st_met", "st_age_gyr", "st_spt",
    "pl_rad_jup", "pl_mass_jup", "pl_period_d", "pl_sma_au", "pl_ecc", "pl_teq_k", "method", "year", "status",
)  # fmt: skip
_STAR = {"st_teff_k": "temperature", "st_mass_sun": "mass", "st_rad_sun": "radius", "st_met": "metallicity",
         "st_age_gyr": "age", "st_spt": "spectraltype"}  # fmt: skip
_PLANET = {"pl_rad_jup": "radius", "pl_mass_jup": "mass", "pl_period_d": "period", "pl_sma_au": "semimajoraxis",
           "pl_ecc": "eccentricity", "pl_teq_k": "temperature", "method": "discoverymethod", "year": "discoveryyear",
           "status": "list"}  # fmt: skip


def _text(node: ElementTree.Element | None, tag: str) -> str:
    """Text of the first child ``tag``; empty when absent."""
    found = node.find(tag) if node is not None else None
    return (found.text or "").strip() if found is not None else ""


def _planets(node: ElementTree.Element, star: ElementTree.Element | None) -> Iterator[tuple]:
    """(planet, its star or None) below a system, binary or star; a planet of a binary has no single star."""
    for child in node:
        if child.tag == "planet":
            yield child, star
        elif child.tag == "star":
            yield from _planets(child, child)
        elif child.tag == "binary":
            yield from _planets(child, None)


def parse(body: bytes, source: str = URL) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of the planet table and of the descriptions, in the order of the file.

    Raises:
        DataError: Not gzip, truncated, not XML, without planets (an error page never becomes a table), larger than 1
            GiB when unpacked, or with declarations of entities.
    """
    if body[:2] != GZIP and (problem := looks_like_a_page(body)):
        raise DataError(source, "", problem)
    try:
        plain = (gunzip(body) if body[:2] == GZIP else body).decode("utf-8")  # another encoding could hide declarations
        if problem := xml_problem(plain):
            raise DataError(source, "", problem)
        root = ElementTree.fromstring(plain)
    except DataError:
        raise
    except (EOFError, ValueError, zlib.error, ElementTree.ParseError) as error:
        raise DataError(source, "", f"is not the catalogue's XML ({error})") from error
    rows: list[dict[str, str]] = []
    texts: list[dict[str, str]] = []
    for system in [root] if root.tag == "system" else root.findall("system"):
        for planet, star in _planets(system, None):
            row = dict.fromkeys(COLUMNS, "")
            row |= {"name": _text(planet, "name"), "system": _text(system, "name")}
            row["distance_pc"] = _text(system, "distance")
            row |= {column: _text(star, tag) for column, tag in _STAR.items()}
            row |= {column: _text(planet, tag) for column, tag in _PLANET.items()}
            rows.append(row)
            if words := " ".join(_text(planet, "description").split()):
                texts.append({"planet": row["name"], "system": row["system"], "text": words})
    if not rows:
        raise DataError(source, "planet", f"no planet in it (root element {root.tag!r})")
    return rows, texts


def fetch(raw: Path, web: Web, url: str = URL) -> list[Path]:
    """Write ``tables/oec_planets.csv.gz`` and ``text/oec_descriptions.jsonl.gz`` below ``raw``."""
    rows, texts = parse(web.get(url), url)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
    made = {raw / "tables/oec_planets.csv.gz": table.getvalue(), raw / "text/oec_descriptions.jsonl.gz": lines}
    for path, text in made.items():
        keep(path, gzip.compress(text.encode(), mtime=0))
    return list(made)
