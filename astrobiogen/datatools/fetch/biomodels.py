"""BioModels: genome-scale models by id, and the ids that a search finds, over its REST interface. NOT VERIFIED ONLINE.

Every model is CC0 by the site's terms of use. ``model/files/<id>`` lists the files, ``model/download/<id>`` sends one.
The service moved from ``www.ebi.ac.uk/biomodels``: its old addresses redirect here and lose ``format=json`` on the way,
so that JSON is also asked for by an Accept header.
"""

from __future__ import annotations

import gzip
import re
import urllib.parse
from pathlib import Path

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.fetch.download import Web, differs, json_object, keep, sbml, stated_checksums
from astrobiogen.datatools.fetch.each import Fetched, each

URL = "https://www.biomodels.org"
SMALLEST_PAGE, LARGEST_PAGE = 10, 100  # results of one request: the service raises fewer to 10
_CHECKSUMS = ("sha256sum", "sha1sum", "md5sum")  # keys of a file list's entries; older models have none
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+")


def search(query: str, web: Web, base: str = URL, limit: int = 100) -> tuple[list[dict[str, str]], int]:
    """Ids and names of the first ``limit`` models that match ``query``, and how many match.

    Args:
        query: In the service's syntax: ``methanogen``, ``modellingapproach:"Constraint-based model"``.
        web, base: How to reach the service, and where.
        limit: Positive; 100 models are asked for at a time.

    Raises:
        DataError: No answer, or one that is no search result.
    """
    found: list[dict[str, str]] = []
    matches = limit
    while len(found) < min(limit, matches):
        page = min(max(limit - len(found), SMALLEST_PAGE), LARGEST_PAGE)
        arguments = {"query": query, "offset": len(found), "numResults": page, "format": "json"}
        url = f"{base}/search?{urllib.parse.urlencode(arguments)}"
        answer = json_object(url, web)
        models, matches = answer.get("models"), answer.get("matches")
        if not isinstance(models, list) or not isinstance(matches, int):
            kinds = f"{type(models).__name__} and {type(matches).__name__}"
            raise DataError(url, "models, matches", f"are {kinds}, expected list and int")
        if not models:
            break
        found += [{"id": str(m.get("id", "")), "name": str(m.get("name", ""))} for m in models]
    return found[:limit], matches


def _fetch_one(raw: Path, web: Web, identifier: str, base: str) -> Path:
    if not _IDENTIFIER.fullmatch(identifier):
        raise DataError(identifier, "", "is no BioModels id, expected letters and digits (MODEL1310110026)")
    path = raw / "metabolic/sbml" / f"{identifier}.xml.gz"
    if path.exists():
        return path
    url = f"{base}/model/files/{identifier}?format=json"
    listed = json_object(url, web).get("main")
    files = [f for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
    names = [str(f.get("name", "")) for f in files]
    number = next((k for k, n in enumerate(names) if n.endswith((".xml", ".sbml"))), None)
    if number is None:
        raise DataError(url, "main", f"lists no .xml file ({names[:5]})")
    url = f"{base}/model/download/{identifier}?filename={urllib.parse.quote(names[number])}"
    body = web.get(url)
    if problem := sbml(body) or differs(body, stated_checksums(files[number], _CHECKSUMS)):
        raise DataError(url, "content", problem)
    keep(path, gzip.compress(body, mtime=0))
    return path


def fetch(raw: Path, web: Web, identifiers: list[str], base: str = URL) -> Fetched:
    """Write ``metabolic/sbml/<id>.xml.gz`` of each model; one that is there is kept.

    A model without a main SBML file, or whose download is not SBML (35 of its ``.xml`` are zip archives), is listed
    among the problems.
    """
    return each(identifiers, "biomodels", lambda identifier: _fetch_one(raw, web, identifier, base))
