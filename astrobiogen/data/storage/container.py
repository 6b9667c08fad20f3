"""The plain container of every packed array file: a JSON header and LZMA blobs, nothing executable.

Layout: 8 bytes ``ASTRODAT``, uint32 little-endian header length, UTF-8 JSON header, then one ``.xz`` stream per array.
The header lists, per array, name, dtype, shape, coding, offset and length, units and free notes. Equal input gives
equal bytes.

Codings: ``raw`` keeps the bytes (split into byte planes); ``delta2`` is for int16 fields whose last two axes are a
map: differences along longitude then latitude (modulo 2^16), zigzag to uint16, byte planes. On the bundled temperature
cubes ``delta2`` needs 5 MB where plain LZMA of the same integers needs 11 MB.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.data.storage.guarded import MOST_UNPACKED, open_regular, read_bounded, unxz

MAGIC = b"ASTRODAT"
# pb=0 and lp=0: the planes hold single bytes without alignment.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 0, "pb": 0}]
_DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64")
AnyArray = NDArray[Any]


class PackedArrays(Mapping[str, AnyArray]):
    """Arrays of one file by name, each decoded when it is first asked for."""

    def __init__(self, path: Path, entries: Mapping[str, Mapping[str, Any]], blobs: Mapping[str, bytes]) -> None:
        self._path, self._entries, self._blobs = path, entries, blobs
        self._decoded: dict[str, AnyArray] = {}

    def __getitem__(self, name: str) -> AnyArray:
        """Array ``name``; a damaged blob, or one that does not fit its shape, is a ``DataError``."""
        if name not in self._decoded:
            entry = self._entries[name]
            try:
                self._decoded[name] = _decode(
                    self._blobs[name], entry["coding"], np.dtype(entry["dtype"]), tuple(entry["shape"])
                )
            except (lzma.LZMAError, ValueError) as error:
                raise DataError(self._path, name, f"damaged ({error})") from error
        return self._decoded[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the file."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self._entries)


@dataclass(frozen=True)
class Contents:
    """Arrays and free attributes of one container file; ``entries`` is what its header states of each array."""

    path: Path
    arrays: PackedArrays
    attributes: dict[str, Any]
    entries: dict[str, dict[str, Any]]

    @property
    def array_notes(self) -> dict[str, dict[str, Any]]:
        """Units and the like, by array."""
        return {name: entry["notes"] for name, entry in self.entries.items()}

    def expect(self, name: str, shape: tuple[int | None, ...], dtype: str) -> None:
        """Check presence, dtype and shape (None: any length) of array ``name`` by the header, without decoding it."""
        if name not in self.entries:
            raise DataError(self.path, name, f"absent; the file holds {sorted(self.entries)}")
        entry = self.entries[name]
        if entry["dtype"] != dtype:
            raise DataError(self.path, name, f"dtype {entry['dtype']}, expected {dtype}")
        found = tuple(entry["shape"])
        if len(found) != len(shape) or any(
            want is not None and have != want for have, want in zip(found, shape, strict=True)
        ):
            raise DataError(self.path, name, f"shape {found}, expected {shape}")

    def get(self, name: str, shape: tuple[int | None, ...], dtype: str) -> AnyArray:
        """Array ``name`` after ``expect``."""
        self.expect(name, shape, dtype)
        return self.arrays[name]


def _planes(array: AnyArray) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size == 0:
        return b""
    little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little.view(np.uint8).reshape(flat.size, -1).T).tobytes()


def _unplanes(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> AnyArray:
    if not data:
        return np.zeros(shape, dtype)
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    if dtype.itemsize == 1:
        return planes.reshape(shape).view(dtype).copy()
    if dtype.itemsize == 2:  # two planes: 4x faster than the general transpose
        return (planes[0].astype(np.uint16) | planes[1].astype(np.uint16) << 8).view(dtype).reshape(shape)
    return (
        np.ascontiguousarray(planes.T)
        .reshape(-1)
        .view(dtype.newbyteorder("<"))
        .astype(dtype, copy=False)
        .reshape(shape)
    )


def _encode(array: AnyArray, coding: str) -> bytes:
    if coding == "delta2":
        words = array.astype(np.int16).view(np.uint16)
        along = words.copy()
        along[..., 1:] -= words[..., :-1]
        both = along.copy()
        both[..., 1:, :] -= along[..., :-1, :]
        signed = both.view(np.int16)
        array = (signed << 1 ^ signed >> 15).view(np.uint16)
    return lzma.compress(_planes(array), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=_FILTERS)


def _decode(data: bytes, coding: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> AnyArray:
    stated = math.prod(shape) * dtype.itemsize
    raw = unxz(data, stated)
    if len(raw) != stated:
        raise ValueError(f"unpacks to {len(raw)} bytes, its shape {shape} of {dtype} needs {stated}")
    if coding != "delta2":
        return _unplanes(raw, dtype, shape)
    zigzag = _unplanes(raw, np.dtype(np.uint16), shape)
    signed = (zigzag >> 1) ^ -(zigzag & 1)
    np.cumsum(signed, axis=-2, out=signed)
    np.cumsum(signed, axis=-1, out=signed)
    return signed.view(np.int16)


def write_arrays(
    path: Path,
    arrays: dict[str, AnyArray],
    attributes: dict[str, Any],
    notes: dict[str, dict[str, Any]] | None = None,
    delta2: tuple[str, ...] = (),
) -> None:
    """Write one container file, see ``packed_arrays``."""
    packed = packed_arrays(path, arrays, attributes, notes, delta2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)


def packed_arrays(
    path: Path,
    arrays: dict[str, AnyArray],
    attributes: dict[str, Any],
    notes: dict[str, dict[str, Any]] | None = None,
    delta2: tuple[str, ...] = (),
) -> bytes:
    """The bytes of one container file; ``parse_arrays`` reads them.

    Args:
        path: For messages.
        arrays: Name to array; dtypes among bool, (u)int8/16, int32/64, float16/32/64.
        attributes: JSON-ready attributes of the file.
        notes: Per array: units, quantisation step and the like.
        delta2: Names of int16 arrays with at least two axes to code as maps.
    """
    blobs: list[bytes] = []
    entries: list[dict[str, Any]] = []
    offset = 0
    _refuse_too_large(path, sum(array.nbytes for array in arrays.values()))
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise DataError(path, name, f"dtype {array.dtype} cannot be packed, expected one of {_DTYPES}")
        coding = "delta2" if name in delta2 else "raw"
        blob = _encode(array, coding)
        entries.append(
            {
                "name": name,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "coding": coding,
                "offset": offset,
                "bytes": len(blob),
                "notes": (notes or {}).get(name, {}),
            }
        )
        blobs.append(blob)
        offset += len(blob)
    header = json.dumps({"arrays": entries, "attributes": attributes}, sort_keys=True, separators=(",", ":")).encode()
    return MAGIC + len(header).to_bytes(4, "little") + header + b"".join(blobs)


def _refuse_too_large(path: Path, unpacked: int) -> None:
    """Zeros pack 20,000 to 1, so that a file of kilobytes may state any size: it is compared before memory is taken."""
    if unpacked > MOST_UNPACKED:
        raise DataError(path, "arrays", f"{unpacked} bytes unpacked, expected at most {MOST_UNPACKED}")


def _well_formed(entry: dict[str, Any]) -> bool:
    """Whether an entry of the header says what it must, in the types that it must have."""
    numbers = [entry["offset"], entry["bytes"], *entry["shape"]]
    return (
        all(type(n) is int and n >= 0 for n in numbers)
        and entry["dtype"] in _DTYPES
        and entry["coding"] in ("raw", "delta2")
        and isinstance(entry["notes"], dict)
    )


def parse_arrays(path: Path, data: bytes) -> Contents:
    """Contents of the bytes of a container file, arrays not yet decoded; ``path`` is for messages.

    Raises:
        DataError: Wrong magic, broken header, truncated blob (names the array), or arrays of more than 1 GiB together.
    """
    if data[:8] != MAGIC:
        raise DataError(path, "", "is not a packed array file (wrong first 8 bytes)")
    size = int.from_bytes(data[8:12], "little")
    try:
        header = json.loads(data[12 : 12 + size])
        entries = {str(e["name"]): e for e in header["arrays"] if _well_formed(e)}
        if len(entries) != len(header["arrays"]) or not isinstance(attributes := header["attributes"], dict):
            raise ValueError("an array's entry is not well formed")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(path, "header", f"cannot be read ({error}); the file is truncated or damaged") from error
    sizes = [math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for entry in entries.values()]
    _refuse_too_large(path, sum(sizes))
    blobs: dict[str, bytes] = {}
    for name, entry in entries.items():
        start = 12 + size + entry["offset"]
        blobs[name] = data[start : start + entry["bytes"]]
        if len(blobs[name]) != entry["bytes"]:
            raise DataError(path, name, f"truncated: {len(blobs[name])} of {entry['bytes']} bytes are there")
    return Contents(path, PackedArrays(path, entries, blobs), attributes, entries)


def read_arrays(path: Path) -> Contents:
    """Read one container file; see ``parse_arrays``."""
    try:
        with open_regular(path) as file:
            data = read_bounded(file, MOST_UNPACKED)
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_arrays(path, data)
