"""One file over HTTP: checked by content, retried, never left half written."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from astrobiogen.data.errors import DataError

Check = Callable[[bytes], str]  # what is wrong with the content, "" when nothing
USER_AGENT = "astrobiogen-data (research software)"
TIMEOUT = 60.0  # seconds without an answer
RETRIES, FIRST_PAUSE = 4, 1.0  # pauses of 1, 2, 4 s
_RETRIED = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Web:
    """How to reach services; tests put a local server or shorter pauses here."""

    timeout: float = TIMEOUT
    retries: int = RETRIES
    first_pause: float = FIRST_PAUSE

    def get(self, url: str, form: dict[str, str] | None = None) -> bytes:
        """Body of ``url`` (a POST when ``form`` is given), complete by its Content-Length.

        Raises
        ------
        DataError
            No answer, an HTTP error, or a truncated body, after the retries.
        """
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        problem = ""
        for attempt in range(self.retries):
            if attempt:
                time.sleep(self.first_pause * 2 ** (attempt - 1))
            request = urllib.request.Request(url, data=data, headers={"User-Agent": USER_AGENT})
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    body = answer.read()
                    stated = answer.headers.get("Content-Length")
                if stated is None or int(stated) == len(body):
                    return body
                problem = f"truncated: {len(body)} of {stated} bytes"
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code} ({error.reason})"
                if error.code not in _RETRIED:
                    break
            except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
                problem = f"no answer ({getattr(error, 'reason', None) or error})"
        raise DataError(url, "", problem)

    def save(self, url: str, path: Path, check: Check, form: dict[str, str] | None = None) -> str:
        """Fetch ``url`` into ``path`` unless a good file lies there already; returns its SHA-256.

        Raises
        ------
        DataError
            As ``get``, or the content fails ``check`` (an error page instead of data): nothing is written.
        """
        if path.exists() and not check(found := path.read_bytes()):
            return hashlib.sha256(found).hexdigest()
        body = self.get(url, form)
        if problem := check(body):
            raise DataError(url, "content", problem)
        keep(path, body)
        return hashlib.sha256(body).hexdigest()


def keep(path: Path, body: bytes) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(body)
    os.replace(part, path)


def looks_like_a_page(body: bytes) -> str:
    """Says so when the content is empty or an HTML page, as services send with status 200 when something is wrong."""
    head = body[:512].lstrip().lower()
    if not body.strip():
        return "is empty"
    if head.startswith((b"<!doctype html", b"<html")) or b"<html" in head:
        return f"is a web page, not data ({body[:60]!r})"
    return ""


def netcdf(body: bytes) -> str:
    """Content check of netCDF files (classic and HDF5)."""
    if body[:3] == b"CDF" or body[:8] == b"\x89HDF\r\n\x1a\n":
        return ""
    return looks_like_a_page(body) or "is not netCDF (wrong first bytes)"


def sbml(body: bytes) -> str:
    """Content check of SBML."""
    return "" if b"<sbml" in body[:4000] else looks_like_a_page(body) or "is not SBML (no <sbml> near its start)"
