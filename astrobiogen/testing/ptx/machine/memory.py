"""Global memory: the tensors that a kernel was given, and nothing else."""

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from astrobiogen.testing.ptx.machine.findings import Findings, KernelError

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY, SEVERAL = -1, -2
Lanes = np.ndarray | slice  # numbers of lanes, or all of them
LINE = 16  # bytes of the widest access


class Region:
    """The bytes of one storage that a kernel may touch, and which block touched them.

    Attributes:
        start, end: addresses.
        name: the arguments that lie in it.
    """

    def __init__(self, start: int, end: int, name: str, granule: int) -> None:
        self.start, self.end, self.name = start, end, name
        self._origin = start - start % LINE
        size = -(-(end - self._origin) // LINE) * LINE
        # Bytes beyond the region belong to other data of the process: bounds are checked before every access.
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._origin))
        self._granule = granule
        self._writer = np.full(size // granule, NOBODY, np.int32)
        self._reader = np.full(size // granule, NOBODY, np.int32)

    def check(self, address: np.ndarray, size: int, what: str) -> None:
        """KernelError unless all of [address, address + size) lies inside."""
        outside = (address < self.start) | (address + np.uint64(size) > self.end)
        if outside.any():
            offset = int(address[outside][0]) - self.start
            raise KernelError(
                f"global memory: {what} outside the tensors: {size} bytes at offset {offset} of {self.name}, "
                f"which has {self.end - self.start} bytes"
            )

    def load(self, address: np.ndarray, size: int, count: int) -> np.ndarray:
        """[lanes, count] values of `size` bytes."""
        return self._rows(size, count)[self._at(address, size * count)]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """Write [lanes, count] values; where lanes share an address the last one stays."""
        size, count = values.dtype.itemsize, values.shape[1]
        self._rows(size, count)[self._at(address, size * count)] = values

    def watch(self, address: np.ndarray, size: int, block: np.ndarray, writes: bool) -> str:
        """Note who touches these bytes; what is wrong with that, or "" """
        units = max(size // self._granule, 1)
        at = self._at(address, self._granule)[:, None] + np.arange(units)
        who = np.broadcast_to(block[:, None], at.shape)
        writer = self._writer[at]
        foreign = (writer != NOBODY) & (writer != who)
        fault = ""
        if writes:
            reader = self._reader[at]
            if foreign.any():
                fault = "global memory: two blocks write the same bytes"
            elif ((reader != NOBODY) & (reader != who)).any():
                fault = "global memory: a block overwrites bytes that another block reads"
            self._writer[at] = who
        else:
            if foreign.any():
                fault = "global memory: a block reads bytes that another block writes"
            reader = self._reader[at]
            self._reader[at] = np.where((reader == NOBODY) | (reader == who), who, SEVERAL)
        return fault

    def _rows(self, size: int, count: int) -> np.ndarray:
        return self._bytes.view(RAW[size]).reshape(-1, count)

    def _at(self, address: np.ndarray, size: int) -> np.ndarray:
        return ((address - np.uint64(self._origin)) // np.uint64(size)).astype(np.int64)


class GlobalMemory:
    """All regions of one launch."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], granule: int, findings: Findings) -> None:
        self._findings = findings
        self._regions = [Region(start, end, name, granule) for start, end, name in _merged(tensors)]
        self._starts = np.array([region.start for region in self._regions], dtype=np.uint64)

    def load(self, address: np.ndarray, size: int, count: int, block: np.ndarray, where: str) -> np.ndarray:
        """[lanes, count] values of `size` bytes from `address` [lanes], read by the lanes' `block`."""
        result = np.empty((len(address), count), RAW[size])
        for lanes, region in self._split(address, size * count, "a load"):
            result[lanes] = region.load(address[lanes], size, count)
            self._note(region.watch(address[lanes], size * count, block[lanes], writes=False), where)
        return result

    def store(self, address: np.ndarray, values: np.ndarray, block: np.ndarray, where: str) -> None:
        """Write [lanes, count] values."""
        size = values.dtype.itemsize * values.shape[1]
        for lanes, region in self._split(address, size, "a store"):
            region.store(address[lanes], values[lanes])
            self._note(region.watch(address[lanes], size, block[lanes], writes=True), where)

    def update(self, address: np.ndarray, size: int, what: str) -> Iterator[tuple[Lanes, Region]]:
        """The lanes of every region, for an atomic operation: those are no races."""
        return self._split(address, size, what)

    def _note(self, fault: str, where: str) -> None:
        if fault:
            self._findings.add(fault, where)

    def _split(self, address: np.ndarray, size: int, what: str) -> Iterator[tuple[Lanes, Region]]:
        if not len(address):
            return
        crooked = address % np.uint64(size) != 0
        if crooked.any():
            raise KernelError(f"global memory: {what} of {size} bytes at address {hex(int(address[crooked][0]))}")
        which = np.searchsorted(self._starts, address, side="right") - 1
        if (which < 0).any():
            raise KernelError(f"global memory: {what} of {size} bytes below all tensors")
        first = int(which[0])
        if (which == first).all():
            self._regions[first].check(address, size, what)
            yield slice(None), self._regions[first]
            return
        for index in np.unique(which):
            lanes = np.flatnonzero(which == index)
            self._regions[index].check(address[lanes], size, what)
            yield lanes, self._regions[index]


def _merged(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[int, int, str]]:
    """(start, end, names) of the bytes that the tensors span; tensors that overlap are views of one storage."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name) for name, tensor in tensors)
    merged: list[tuple[int, int, str]] = []
    for start, end, name in spans:
        if start == end:
            continue
        if merged and start < merged[-1][1]:
            before = merged.pop()
            merged.append((before[0], max(before[1], end), f"{before[2]}, {name}"))
        else:
            merged.append((start, end, name))
    return merged


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()
