"""ROCKE-3D (NASA GISS) and THAI: netCDF files from listings of a web folder. NOT VERIFIED ONLINE.

Both are listings of links; what is taken is chosen by a pattern, since the sets are large. ROCKE-3D keeps a run's
variables in several files (``aij``: surface, ``aijl``: model levels): put those of one climate and segment into one
folder ``climate/<planet>_g<epoch>_<setting>_seg{1,2}/`` and ``build`` reads them together.
"""

from __future__ import annotations

import html.parser
import re
import urllib.parse
from pathlib import Path

from astrobiogen.data.errors import DataError
from astrobiogen.data.fetch.download import Web, netcdf
from astrobiogen.data.progress import track

SOURCES = {
    # Way et al. 2018, ApJS 239, 24; licence: US government work
    "rocke3d": "https://portal.nccs.nasa.gov/GISS_modelE/ROCKE-3D/publication-supplements/"
    "Climates_of_Warm_Earth_like_Planets_I/",
    # Fauchez et al. 2020, GMD 13, 707; its licence is not confirmed: ask before passing files on
    "thai": "https://thai.emac.gsfc.nasa.gov/dataset/",
}


class _Links(html.parser.HTMLParser):
    """Targets of the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the target of an ``<a href>``."""
        target = dict(attrs).get("href") if tag == "a" else None
        if target:
            self.found.append(target)


def _targets(url: str, web: Web) -> list[str]:
    """Absolute links of a page."""
    page = _Links()
    page.feed(web.get(url).decode("utf-8", errors="replace"))
    return [urllib.parse.urljoin(url, target) for target in page.found]


def listing(url: str, web: Web, pattern: str) -> list[str]:
    """URLs of the ``.nc`` files on the page ``url``, and in the folders that it lists below itself, whose name matches
    ``pattern``, in the pages' order.

    Raises
    ------
    DataError
        No answer, or none matches.
    """
    every = _targets(url, web)
    # ROCKE-3D sorts by kind of file (AIJ/, AIJL/, ...); links up the tree or elsewhere are not followed
    for folder in dict.fromkeys(u for u in every if u.endswith("/") and u.startswith(url) and u != url):
        every += _targets(folder, web)
    files = [u for u in every if urllib.parse.urlparse(u).path.endswith((".nc", ".nc4"))]
    chosen = [u for u in files if re.search(pattern, urllib.parse.urlparse(u).path.rsplit("/", 1)[-1])]
    if not chosen:
        raise DataError(url, "links", f"{len(files)} netCDF files are listed, none matches {pattern!r}")
    return list(dict.fromkeys(chosen))


def fetch(source: str, raw: Path, web: Web, pattern: str, url: str | None = None) -> list[Path]:
    """Download the matching files into ``climate-<source>/`` below ``raw``; files that are there are kept."""
    made: list[Path] = []
    links = listing(url or SOURCES[source], web, pattern)
    for link in track(links, source, len(links), lambda u: u.rsplit("/", 1)[-1]):
        path = raw / f"climate-{source}" / urllib.parse.unquote(urllib.parse.urlparse(link).path.rsplit("/", 1)[-1])
        web.save(link, path, netcdf)
        made.append(path)
    return made
