"""A gzip file read as a stream: a thread unpacks what comes next while the reader works on what came last."""

import io
import os
import queue
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_PACKED = 1 << 16  # bytes read at once
_PIECE = 1 << 19  # bytes unpacked at once, at most
_AHEAD = 4  # unpacked pieces that wait for the reader
_POLL = 0.1  # seconds between two looks at whether the reader has gone


def _pieces(path: Path) -> Iterator[bytes]:
    """The content of `path`, one gzip member or several, never empty pieces."""
    member = zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        while packed := file.read(_PACKED):
            full = False
            while packed or full:
                if member.eof:
                    member = zlib.decompressobj(wbits=31)
                if piece := member.decompress(packed, _PIECE):
                    yield piece
                packed = member.unused_data if member.eof else member.unconsumed_tail
                full = len(piece) == _PIECE and not member.eof
    if not member.eof:
        raise EOFError(f"{path} ends before its end-of-stream marker")


class _Unpacking(io.RawIOBase):
    """Reads forward only."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
        self._left = threading.Event()
        self._piece = memoryview(b"")
        self._ended = False
        self._position = 0
        threading.Thread(target=self._unpack, args=(path,), name="log unpacking", daemon=True).start()

    def _unpack(self, path: Path) -> None:
        try:
            for piece in _pieces(path):
                if not self._put(piece):
                    return
            self._put(b"")
        except Exception as error:  # raised anew where the stream is read
            self._put(error)

    def _put(self, piece: bytes | Exception) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(piece, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not self._piece and not self._ended:
            piece = self._queue.get()
            self._ended = not piece or isinstance(piece, Exception)
            if isinstance(piece, Exception):
                raise piece
            self._piece = memoryview(piece)
        count = min(len(self._piece), len(buffer))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("a compressed log is read forwards")
        left = offset - self._position
        while left and (count := self.readinto(memoryview(bytearray(min(left, _PIECE))))):
            left -= count
        return self._position

    def close(self) -> None:
        self._left.set()
        super().close()


def unpacked(path: Path) -> BinaryIO:
    """The content of the gzip file `path`, to be read forwards; holds a few pieces of it at a time.

    Raises (where it is read):
        EOFError, zlib.error: Truncated or damaged.
    """
    return io.BufferedReader(_Unpacking(path), _PIECE)
