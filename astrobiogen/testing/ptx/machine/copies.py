"""Asynchronous copies from global to shared memory (`cp.async`), in groups per thread.

A copy's bytes are read from global memory when it begins; they are put into shared memory when the thread waits for
its group. Whoever looks before that sees old data, and `SharedMemory` reports it.
"""

import dataclasses

import numpy as np

from astrobiogen.testing.ptx.machine.shared import SharedMemory


@dataclasses.dataclass
class _Copy:
    """One instruction's copies: `lane`s, `group` of each, where they go and what they carry."""

    lane: np.ndarray
    group: np.ndarray
    units: np.ndarray
    address: np.ndarray
    rows: np.ndarray
    warp: np.ndarray

    def part(self, chosen: np.ndarray) -> "_Copy":
        return _Copy(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


class Copies:
    """The copies that are under way."""

    def __init__(self, shared: SharedMemory, lanes: int) -> None:
        self._shared = shared
        self._group = np.zeros(lanes, np.int64)  # number of the group that each thread fills
        self._pending: list[_Copy] = []

    def begin(self, lane: np.ndarray, address: np.ndarray, rows: np.ndarray, warp: np.ndarray, where: str) -> None:
        """Start copying `rows` [lanes, bytes] to `address`."""
        units = self._shared.claim(address, rows.shape[1], warp, where)
        self._shared.depart(units)
        self._pending.append(_Copy(lane, self._group[lane], units, address, rows, warp))

    def commit(self, lane: np.ndarray) -> None:
        """Close the group of these threads."""
        self._group[lane] += 1

    def wait(self, lane: np.ndarray, newest: int) -> None:
        """Finish all groups of these threads but the `newest` last ones that were closed."""
        limit = np.full(len(self._group), -1, np.int64)
        limit[lane] = self._group[lane] - newest
        left: list[_Copy] = []
        for copy in self._pending:
            done = copy.group < limit[copy.lane]
            if done.all():
                self._finish(copy)
            elif done.any():
                self._finish(copy.part(done))
                left.append(copy.part(~done))
            else:
                left.append(copy)
        self._pending = left

    def _finish(self, copy: _Copy) -> None:
        self._shared.arrive(copy.units, copy.address, copy.rows, copy.warp)
