"""Files that someone else may have made: inside their folder, regular, and never larger unpacked than they may be.

A list of names that came with the files (a manifest) may name anything: ``../../etc/passwd``, a pipe that nobody writes
into, ``/dev/zero``. A file of kilobytes may unpack to gigabytes. Both are refused before they are read.
"""

from __future__ import annotations

import lzma
import os
import stat
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from xml.parsers import expat

GZIP = b"\x1f\x8b"
MIB = 2**20
MOST_UNPACKED = 1024 * MIB  # of one file; the largest known network unpacks to 0.04 GiB, a bundled climate to 1 MiB
MOST_PACKED = 1100  # deflate, which netCDF-4 and Zarr use, packs 1 : 1032 at most
MOST_EMPTY = 64 * MIB  # of a variable that was never written: its chunks take no room
# Of LZMA's own tables: preset 6, which packs use, takes 9 MiB, preset 9 65 MiB; a header may ask for 4 GiB.
_LZMA_MEMORY = 128 * MIB
MOST_NESTED = 200  # XML elements within one another; SBML takes about 12, with notes and formulas 40
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def check_stated_size(path: Path, stated: int) -> None:
    """``stated`` bytes, what the headers of the file or folder of files at ``path`` say that a variable holds, can be
    in it: packed as well as anything packs, an empty variable of a map's size aside.

    Raises:
        ValueError: They cannot: reading the variable would take memory that no file of this size is worth.
    """
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    packed = sum(p.stat().st_size for p in files)
    if stated > MOST_EMPTY + MOST_PACKED * packed:
        raise ValueError(f"states a variable of {stated} bytes in {packed} bytes of files: refused")


def open_inside(root: Path, name: str) -> BinaryIO:
    """The regular file ``name`` (parts separated by ``/``) of the folder ``root``, open for reading.

    Links are followed as long as they stay inside ``root``, which may itself be reached through one.

    Raises:
        OSError: The name leads out of the folder, is missing, or is a pipe, device, socket or folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OSError(f"{name!r} is no name of a file inside {root}")
    base = root.resolve(strict=True)
    path = (base / name).resolve(strict=True)
    if not path.is_relative_to(base):
        raise OSError(f"{root / name} is a link that leads out of {root}")
    return open_regular(path)


def open_regular(path: Path) -> BinaryIO:
    """The regular file ``path``, open for reading; anything else that could make a reader wait is an ``OSError``."""
    _require_regular(path, os.stat(path).st_mode)  # before it is opened: opening a device can act on it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS if test(mode)), "a device")
        raise OSError(f"{path} is {kind}, expected a regular file")


def read_bounded(file: BinaryIO, most: int) -> bytes:
    """All of an open regular file.

    Raises:
        OSError: It has more than ``most`` bytes.
    """
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise OSError(f"has {size} bytes, expected at most {most}")
    return file.read(size)


def gunzip(data: bytes, most: int = MOST_UNPACKED) -> bytes:
    """The content of a gzip file (one member or several).

    Raises:
        ValueError: It unpacks to more than ``most`` bytes; no more than that is ever held.
        EOFError, zlib.error: Truncated or damaged.
    """
    pieces: list[bytes] = []
    left, rest = most, data
    while rest:
        member = zlib.decompressobj(wbits=31)
        pieces.append(member.decompress(rest, left + 1))
        left -= len(pieces[-1])
        if left < 0:
            raise ValueError(f"unpacks to more than {most} bytes: refused")
        if not member.eof:
            raise EOFError("the archive ends before its end-of-stream marker")
        rest = member.unused_data.lstrip(b"\0")  # tapes pad with zeros, which gzip accepts
    return b"".join(pieces)


def unxz(data: bytes, most: int) -> bytes:
    """The content of an ``.xz`` stream.

    Raises:
        ValueError: It unpacks to more than ``most`` bytes, or bytes follow its end; no more than that is ever held.
        lzma.LZMAError: Truncated, damaged, or it asks for more than 128 MiB of tables.
    """
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    pieces: list[bytes] = []
    left = most + 1
    while left > 0 and not stream.eof:
        piece = stream.decompress(data, left)
        data = b""
        pieces.append(piece)
        left -= len(piece)
        if not piece and not stream.eof and stream.needs_input:
            raise lzma.LZMAError("the stream ends before its end-of-stream marker")
    if not left:
        raise ValueError(f"unpacks to more than {most} bytes: refused")
    if stream.unused_data:
        raise ValueError(f"{len(stream.unused_data)} bytes follow the end of the stream")
    return b"".join(pieces)


class _RefusedError(Exception):
    """What was found."""


def xml_problem(text: str) -> str:
    """What makes XML dangerous to a parser, empty when nothing does: declarations of a document type, whose entities
    expand without limit and may name other files, and elements nested so deep that a parser's stack overflows. Text
    that is not well formed is left to the parser, up to where it goes wrong.
    """
    depth = 0

    def declared(*_: object) -> None:
        raise _RefusedError("declares a document type, whose entities may expand without limit: refused")

    def opened(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > MOST_NESTED:
            raise _RefusedError(f"nests more than {MOST_NESTED} elements: refused")

    def closed(*_: object) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.StartElementHandler, parser.EndElementHandler = declared, opened, closed
    try:
        parser.Parse(text, True)
    except _RefusedError as error:
        return str(error)
    except expat.ExpatError:
        return ""
    return ""
