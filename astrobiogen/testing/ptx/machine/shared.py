"""Shared memory of the blocks that run together, with its history: who wrote and read what since the last barrier.

Two warps of a block may touch the same bytes in one interval between barriers only if both read them. Values do not
show a missing barrier, because the emulator runs warps in step; this history does.
"""

import numpy as np

from astrobiogen.testing.ptx.machine.findings import Findings, KernelError
from astrobiogen.testing.ptx.machine.memory import RAW

# A stamp is epoch * STEP + warp of the block; the last number of an epoch stands for several warps.
STEP = 64
SEVERAL = STEP - 1
LINE = 16
UNWRITTEN = "shared memory: read before anything was written"
IN_FLIGHT = "shared memory: read while an asynchronous copy writes it, without a wait"
OVER_FLIGHT = "shared memory: written while an asynchronous copy writes it"
READ_AFTER_WRITE = "shared memory: read after another warp's write without a barrier"
WRITE_AFTER_WRITE = "shared memory: written after another warp's write without a barrier"
WRITE_AFTER_READ = "shared memory: written after another warp's read without a barrier"


class SharedMemory:
    """`size` bytes for each of `blocks` blocks. Addresses are those of the whole: block b begins at b * `stride`."""

    def __init__(self, size: int, blocks: int, granule: int, findings: Findings) -> None:
        self.size = size
        self.stride = max(-(-size // LINE) * LINE, LINE)
        self._granule = granule
        units = self.stride * blocks // granule
        self._bytes = np.full(self.stride * blocks, 0xFF, np.uint8)  # NaN where nothing was written
        self._write = np.full(units, -1, np.int32)  # stamp of the last write
        self._read = np.full(units, -1, np.int32)  # stamp of the last read
        self._flying = np.zeros(units, np.int16)  # asynchronous copies on their way
        self._copies = 0
        self._epoch = np.zeros(blocks, np.int32)
        self._findings = findings

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks have met."""
        self._epoch[blocks] += STEP

    def load(self, address: np.ndarray, size: int, count: int, warp: np.ndarray, where: str) -> np.ndarray:
        """[lanes, count] values of `size` bytes from `address` [lanes], read by the lanes' `warp` of their block."""
        at, epoch = self._units(address, size * count, "read")
        mine = epoch + warp[:, None]
        written = self._write[at]
        if (written < 0).any():
            self._findings.add(UNWRITTEN, where)
        if ((written >= epoch) & (written != mine)).any():
            self._findings.add(READ_AFTER_WRITE, where)
        self._check_flight(at, IN_FLIGHT, where)
        seen = self._read[at]
        self._read[at] = np.where((seen < epoch) | (seen == mine), mine, epoch + SEVERAL)
        lost = self._read[at] != mine  # several warps may read a byte in this very instruction: one is on record
        if lost.any():
            self._read[at[lost]] = np.broadcast_to(epoch + SEVERAL, at.shape)[lost]
        return self._bytes.view(RAW[size]).reshape(-1, count)[address // (size * count)]

    def store(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray, where: str) -> None:
        """Write [lanes, count] values."""
        size, count = values.dtype.itemsize, values.shape[1]
        at = self.claim(address, size * count, warp, where)
        self._bytes.view(RAW[size]).reshape(-1, count)[address // (size * count)] = values
        self._settle(at, address, warp)

    def claim(self, address: np.ndarray, size: int, warp: np.ndarray, where: str) -> np.ndarray:
        """Check that `size` bytes from each `address` may be written now; their units."""
        at, epoch = self._units(address, size, "written")
        mine = epoch + warp[:, None]
        written, seen = self._write[at], self._read[at]
        if ((written >= epoch) & (written != mine)).any():
            self._findings.add(WRITE_AFTER_WRITE, where)
        if ((seen >= epoch) & (seen != mine)).any():
            self._findings.add(WRITE_AFTER_READ, where)
        self._check_flight(at, OVER_FLIGHT, where)
        return at

    def depart(self, at: np.ndarray) -> None:
        """Asynchronous copies to these units begin."""
        np.add.at(self._flying, at, 1)
        self._copies += len(at)

    def arrive(self, at: np.ndarray, address: np.ndarray, rows: np.ndarray, warp: np.ndarray) -> None:
        """Copies that began have written `rows` [lanes, bytes]: the threads of `warp` have waited for them."""
        np.add.at(self._flying, at, -1)
        self._copies -= len(at)
        self._bytes.reshape(-1, rows.shape[1])[address // rows.shape[1]] = rows
        self._settle(at, address, warp)

    def _check_flight(self, at: np.ndarray, what: str, where: str) -> None:
        if self._copies and self._flying[at].any():
            self._findings.add(what, where)

    def _settle(self, at: np.ndarray, address: np.ndarray, warp: np.ndarray) -> None:
        self._write[at] = self._epoch[address // self.stride][:, None] + warp[:, None]

    def _units(self, address: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(units [lanes, n], epoch [lanes, 1]) of `size` bytes from each address, after checking them."""
        if (address % size != 0).any():
            raise KernelError(f"shared memory: {size} bytes {what} at an address that is no multiple of it")
        inside = address % self.stride
        if (address < 0).any() or (inside + size > self.size).any() or (address >= len(self._bytes)).any():
            raise KernelError(f"shared memory: {size} bytes {what} at {int(inside.max())} of {self.size}")
        at = address[:, None] // self._granule + np.arange(max(size // self._granule, 1))
        return at, self._epoch[address // self.stride][:, None]
