"""ROCKE-3D (NASA GISS) and THAI: netCDF files of other climate models. NOT VERIFIED ONLINE.

What is taken is chosen by a pattern, since the sets are large. ROCKE-3D is a web folder, listed as links; THAI is an
organisation of a CKAN catalogue, whose documented API (``package_search``) names the files of its data sets. ROCKE-3D
keeps a run's variables in several files (``aij``: surface, ``aijl``: model levels): put those of one climate and
segment into one folder ``climate/<planet>_g<epoch>_<setting>_seg{1,2}/`` and ``build`` reads them together.
"""

from __future__ import annotations

import html.parser
import re
import urllib.parse
from collections import Counter
from pathlib import Path, PurePosixPath

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.fetch.download import Web, json_object, netcdf, stated_checksums
from astrobiogen.datatools.fetch.each import Fetched, each

# Way et al. 2018, ApJS 239, 24; licence: US government work
ROCKE3D = (
    "https://portal.nccs.nasa.gov/GISS_modelE/ROCKE-3D/publication-supplements/Climates_of_Warm_Earth_like_Planets_I/"
)
# Fauchez et al. 2020, GMD 13, 707, and its parts I to III; licence not confirmed: ask before passing files on
THAI, THAI_ORGANISATION = "https://ckan.emac.gsfc.nasa.gov", "thai"
CKAN_PAGE = 100  # data sets of one request
_SUFFIXES = (".nc", ".nc4")


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


def folder_links(url: str, web: Web) -> list[str]:
    """Links on the page ``url`` and in the folders that it lists below itself, in the pages' order."""
    every = _targets(url, web)
    # ROCKE-3D sorts by kind of file (AIJ/, AIJL/, ...); links up the tree or elsewhere are not followed
    for folder in dict.fromkeys(u for u in every if u.endswith("/") and u.startswith(url) and u != url):
        every += _targets(folder, web)
    return every


def ckan_links(base: str, web: Web) -> dict[str, dict[str, str]]:
    """Addresses of the files of every THAI data set in the CKAN catalogue at ``base``, each with the checksums that the
    catalogue states (field ``hash``, often empty).

    Raises:
        DataError: No answer, or one that is not of CKAN's ``package_search``.
    """
    links: dict[str, dict[str, str]] = {}
    seen, count = 0, 1
    while seen < count:
        arguments = {"fq": f"organization:{THAI_ORGANISATION}", "rows": CKAN_PAGE, "start": seen}
        url = f"{base}/api/3/action/package_search?{urllib.parse.urlencode(arguments)}"
        result = json_object(url, web).get("result")
        packages = result.get("results") if isinstance(result, dict) else None
        if not isinstance(result, dict) or not isinstance(packages, list) or not isinstance(result.get("count"), int):
            raise DataError(url, "result", "is not an object with count and results")
        if not packages:
            break
        seen, count = seen + len(packages), result["count"]
        resources = [resource for package in packages for resource in package.get("resources", ())]
        links |= {str(r.get("url", "")): stated_checksums(r, ("hash",)) for r in resources}
    return links


def _name(link: str) -> str:
    return PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(link).path)).name


def listing(source: str, web: Web, pattern: str, url: str | None = None) -> list[str]:
    """Addresses of the netCDF files of ``source`` (at ``url``, a mirror) whose file name matches ``pattern``.

    Raises:
        DataError: No answer, none matches, or two have the same file name.
    """
    return list(_listed(source, web, pattern, url))


def _listed(source: str, web: Web, pattern: str, url: str | None) -> dict[str, dict[str, str]]:
    """``listing``, each address with the checksums that the source states."""
    where = url or {"rocke3d": ROCKE3D, "thai": THAI}[source]
    every = ckan_links(where.rstrip("/"), web) if source == "thai" else {k: {} for k in folder_links(where, web)}
    web_links = (link for link in every if link.startswith(("http://", "https://")))
    files = [link for link in web_links if _name(link).endswith(_SUFFIXES)]
    chosen = [link for link in files if re.search(pattern, _name(link))]
    if not chosen:
        raise DataError(where, "links", f"{len(files)} netCDF files are listed, none matches {pattern!r}")
    name, times = Counter(map(_name, chosen)).most_common(1)[0]
    if times > 1:
        raise DataError(where, "links", f"{times} files are named {name!r}; a narrower --pattern must choose one")
    return {link: every[link] for link in chosen}


def fetch(source: str, raw: Path, web: Web, pattern: str, url: str | None = None) -> Fetched:
    """Download the matching files into ``climate-<source>/`` below ``raw``; files that are there are kept, a bad one is
    listed among the problems.
    """

    listed = _listed(source, web, pattern, url)

    def one(link: str) -> Path:
        path = raw / f"climate-{source}" / _name(link)
        web.save(link, path, netcdf, expected=listed[link])
        return path

    return each(list(listed), source, one)
