"""Raw files, plain or compressed."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from astrobiogen.data.errors import unreadable

_GZIP = b"\x1f\x8b"


def unpacked(path: Path) -> bytes:
    """Content of a file, decompressed when its first bytes say gzip.

    Raises
    ------
    DataError
        Missing, unreadable, or a truncated or damaged archive.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == _GZIP else raw
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error
