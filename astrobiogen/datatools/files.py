"""Raw files, plain or compressed."""

from __future__ import annotations

import zlib
from pathlib import Path

from astrobiogen.data.errors import unreadable
from astrobiogen.data.storage.guarded import GZIP, MOST_UNPACKED, gunzip, open_regular, read_bounded


def unpacked(path: Path) -> bytes:
    """Content of a file, decompressed when its first bytes say gzip.

    Raises:
        DataError: Missing, no regular file, unreadable, a truncated or damaged archive, or more than 1 GiB when
            unpacked.
    """
    try:
        with open_regular(path) as file:
            raw = read_bounded(file, MOST_UNPACKED)
        return gunzip(raw) if raw[:2] == GZIP else raw
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise unreadable(path, error) from error
