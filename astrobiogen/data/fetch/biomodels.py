"""BioModels (EBI): genome-scale models by id, over its REST interface. NOT VERIFIED ONLINE.

Every model is CC0 by the site's terms of use. ``model/files/<id>?format=json`` lists the files, ``model/download/<id>``
sends one.
"""

from __future__ import annotations

import gzip
import json
import urllib.parse
from pathlib import Path
from typing import Any

from astrobiogen.data.errors import DataError
from astrobiogen.data.fetch.download import Web, keep, looks_like_a_page, sbml

URL = "https://www.ebi.ac.uk/biomodels"


def _json(body: bytes, url: str) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError as error:
        raise DataError(url, "", looks_like_a_page(body) or f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DataError(url, "", f"is a {type(document).__name__}, expected an object")
    return document


def search(query: str, web: Web, base: str = URL, limit: int = 100) -> list[dict[str, str]]:
    """Ids and names of the models that match ``query`` (``modellingapproach:"Constraint-based model"``)."""
    arguments = urllib.parse.urlencode({"query": query, "numResults": limit, "format": "json"})
    url = f"{base}/search?{arguments}"
    models = _json(web.get(url), url).get("models")
    if not isinstance(models, list):
        raise DataError(url, "models", f"is {type(models).__name__}, expected a list")
    return [{"id": str(m.get("id", "")), "name": str(m.get("name", ""))} for m in models]


def fetch(raw: Path, web: Web, identifiers: list[str], base: str = URL) -> list[Path]:
    """Write ``metabolic/sbml/<id>.xml.gz`` of each model.

    Raises
    ------
    DataError
        No main SBML file in the listing, or the download is not SBML (35 of its ``.xml`` are zip archives).
    """
    made: list[Path] = []
    for identifier in identifiers:
        path = raw / "metabolic/sbml" / f"{identifier}.xml.gz"
        made.append(path)
        if path.exists():
            continue
        url = f"{base}/model/files/{urllib.parse.quote(identifier)}?format=json"
        listed = _json(web.get(url), url).get("main")
        names = [str(f.get("name", "")) for f in listed if isinstance(f, dict)] if isinstance(listed, list) else []
        name = next((n for n in names if n.endswith((".xml", ".sbml"))), None)
        if name is None:
            raise DataError(url, "main", f"lists no .xml file ({names[:5]})")
        url = f"{base}/model/download/{urllib.parse.quote(identifier)}?filename={urllib.parse.quote(name)}"
        body = web.get(url)
        if problem := sbml(body):
            raise DataError(url, "content", problem)
        keep(path, gzip.compress(body, mtime=0))
    return made
