"""One file over HTTP: checked by content, retried, never left half written."""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import json
import math
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.progress import track
from astrobiogen.system import staging

Result = TypeVar("Result")
Check = Callable[[Path], str]  # what is wrong with the content, "" when nothing
USER_AGENT = "astrobiogen-data (research software)"
ANYTHING, JSON = "*/*", "application/json"
TIMEOUT = 60.0  # seconds without an answer
MOST_HELD, MOST_SAVED = 2**30, 2**36  # bytes of one answer, in memory and on disk
RETRIES, FIRST_PAUSE = 4, 1.0  # pauses of 1, 2, 4 s
CHUNK = 1 << 20  # bytes; climate files of gigabytes pass through memory in such pieces
SHOWN_FROM = 16  # chunks; a larger file shows its progress
HEAD = 4096  # bytes that tell the kind of a file
_IN_URLS = "%/:?#[]@!$&'()*+,;=~"  # kept; blanks and letters outside ASCII, which listings hold, are quoted
_CHECKSUMS = {32: "md5", 40: "sha1", 64: "sha256"}  # hexadecimal digits to kind
_RETRIED = (429, 500, 502, 503, 504)


def _secure(url: str) -> bool:
    """https, or plain http to this very machine (a mirror, a tunnel)."""
    parts = urllib.parse.urlparse(url)
    if parts.scheme != "http":
        return parts.scheme == "https"
    try:
        return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, to secure addresses only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The request of the new address; an insecure one is a ``DataError``."""
        if not _secure(newurl):
            raise DataError(req.full_url, "", f"redirects to {newurl}, which is not https: anyone could answer there")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def stated_checksums(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """The checksums that an entry of a listing states under ``keys``: ``hashlib``'s name to hexadecimal digits. A
    prefix (``md5:``) or the number of digits tells the kind; what is no checksum is left out.
    """
    found = {}
    for key in keys:
        prefix, _, value = str(entry.get(key) or "").strip().lower().rpartition(":")
        kind = _CHECKSUMS.get(len(value), "")
        if kind and prefix in ("", kind) and set(value) <= set(string.hexdigits):
            found[kind] = value
    return found


def differs(content: bytes | Path, expected: Mapping[str, str]) -> str:
    """What differs from the checksums that the source states, empty when nothing does."""
    for kind, wanted in expected.items():
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as handle:
            if (found := hashlib.file_digest(handle, kind).hexdigest()) != wanted:
                return f"has {kind} {found[:16]}..., the source states {wanted[:16]}...: changed on its way"
    return ""


class NoAnswerError(DataError):
    """The service cannot be reached: other files of it cannot be had either."""


@dataclass(frozen=True)
class Web:
    """How to reach services; tests put a local server or shorter pauses here."""

    timeout: float = TIMEOUT
    retries: int = RETRIES
    first_pause: float = FIRST_PAUSE

    def get(self, url: str, form: dict[str, str] | None = None, accept: str = ANYTHING) -> bytes:
        """Body of ``url`` (a POST when ``form`` is given), complete by its Content-Length; redirects are followed and
        keep the Accept header.

        Raises:
            DataError: No answer (``NoAnswerError``), an HTTP error, or a truncated body, after the retries.
        """
        return self._attempts(url, lambda: b"".join(_chunks(url, self._opened(url, form, accept), MOST_HELD)))

    def save(
        self,
        url: str,
        path: Path,
        check: Check,
        form: dict[str, str] | None = None,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        """Fetch ``url`` into ``path``, piece by piece, unless a good file lies there already.

        Raises:
            DataError: As ``get``, the content fails ``check`` (an error page instead of data), or it has other
                checksums than ``expected``: ``path`` stays as it was.
        """
        if path.exists() and not check(path) and not differs(path, expected or {}):
            return
        with staging.staged(path) as part:

            def write() -> None:
                with part.open("wb") as handle:
                    for piece in _chunks(url, self._opened(url, form, ANYTHING), MOST_SAVED, path.name):
                        handle.write(piece)

            self._attempts(url, write)
            if problem := check(part) or differs(part, expected or {}):
                raise DataError(url, "content", problem)

    def _opened(self, url: str, form: dict[str, str] | None, accept: str) -> http.client.HTTPResponse:
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        headers = {"User-Agent": USER_AGENT, "Accept": accept}
        if not url.startswith(("http://", "https://")):
            raise DataError(url, "", "is no address of the web (https://)")
        if not _secure(url):
            raise DataError(url, "", "is not https: anyone on the way could change what comes")
        request = urllib.request.Request(urllib.parse.quote(url, safe=_IN_URLS), data=data, headers=headers)
        return urllib.request.build_opener(_Redirects).open(request, timeout=self.timeout)

    def _attempts(self, url: str, once: Callable[[], Result]) -> Result:
        """``once``, repeated after longer and longer pauses while the fault may pass."""
        kind, problem = DataError, ""
        for attempt in range(self.retries):
            if attempt:
                time.sleep(self.first_pause * 2 ** (attempt - 1))
            try:
                return once()
            except urllib.error.HTTPError as error:
                kind, problem = DataError, f"HTTP status {error.code} ({error.reason})"
                if error.code not in _RETRIED:
                    break
            except _TruncatedError as error:
                kind, problem = DataError, str(error)
            except (
                urllib.error.URLError,
                TimeoutError,
                ConnectionError,
                ssl.SSLError,
                http.client.HTTPException,
            ) as error:
                kind, problem = NoAnswerError, f"no answer ({getattr(error, 'reason', None) or error})"
        raise kind(url, "", problem)


class _TruncatedError(Exception):
    """Fewer bytes came than the answer's Content-Length."""


def _chunks(url: str, answer: http.client.HTTPResponse, most: int, name: str = "") -> Iterator[bytes]:
    """Pieces of the body, to its stated end; with ``name``, a large one shows its progress. More than ``most`` bytes
    are a ``DataError``.
    """
    with answer:
        length = answer.headers.get("Content-Length") or ""
        stated = int(length) if length.isdecimal() else None
        pieces = iter(lambda: answer.read(CHUNK), b"")
        total = math.ceil(stated / CHUNK) if stated is not None else 0
        got = 0
        for piece in track(pieces, f"{name} [MiB]", total) if name and total >= SHOWN_FROM else pieces:
            got += len(piece)
            if got > most:
                raise DataError(url, "", f"sends more than {most} bytes: refused")
            yield piece
        if stated is not None and got != stated:
            raise _TruncatedError(f"truncated: {got} of {stated} bytes")


def keep(path: Path, body: bytes) -> None:
    """Write ``path`` whole or not at all."""
    with staging.staged(path) as part:
        part.write_bytes(body)


def looks_like_a_page(body: bytes) -> str:
    """Says so when the content is empty or an HTML page, as services send with status 200 when something is wrong."""
    head = body[:512].lstrip().lower()
    if not body.strip():
        return "is empty"
    if head.startswith((b"<!doctype html", b"<html")) or b"<html" in head:
        return f"is a web page, not data ({body[:60]!r})"
    return ""


def json_object(url: str, web: Web) -> dict[str, Any]:
    """The JSON object that ``url`` answers.

    Raises:
        DataError: No answer, or it is a web page or other JSON.
    """
    body = web.get(url, accept=JSON)
    try:
        document = json.loads(body)
    except ValueError as error:
        raise DataError(url, "", looks_like_a_page(body) or f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise DataError(url, "", f"is a {type(document).__name__}, expected an object")
    return document


def netcdf(path: Path) -> str:
    """Content check of netCDF files (classic and HDF5)."""
    with path.open("rb") as handle:
        head = handle.read(HEAD)
    if head[:3] == b"CDF" or head[:8] == b"\x89HDF\r\n\x1a\n":
        return ""
    return looks_like_a_page(head) or "is not netCDF (wrong first bytes)"


def sbml(body: bytes) -> str:
    """Content check of SBML."""
    return "" if b"<sbml" in body[:HEAD] else looks_like_a_page(body) or "is not SBML (no <sbml> near its start)"
