"""Climates read when they are asked for, through a cache of bounded size."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor

MIB = 2**20


class CubeCache:
    """The most recently used results of ``read``, at most ``max_bytes`` of them.

    A process has its own: copies that worker processes get by pickling start empty, forked ones go on from what the
    parent held. The tensors are shared with everyone who asked, and must not be written to.

    Args:
        read: Makes the tensor of a name; may raise ``DataError``, which is not remembered.
        max_bytes: Upper limit of what is held, >= 0. With 0, or for a tensor that is larger, nothing is kept.
        stored: Gives the SHA-256 of the file that the tensor of a name is read from; None: there are no files.

    Attributes:
        held_bytes: What is held now.
        reads: How often ``read`` was called.
    """

    def __init__(
        self, read: Callable[[str], Tensor], max_bytes: int, stored: Callable[[str], str] | None = None
    ) -> None:
        self.read, self.max_bytes, self.stored = read, max_bytes, stored
        self._clear()

    def _clear(self) -> None:
        self.held_bytes, self.reads = 0, 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Tensor:
        """The tensor of ``name``, from memory or by ``read``."""
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            self.reads += 1
            made = self.read(name)
            size = made.nbytes
            if size <= self.max_bytes:
                self._held[name] = made
                self.held_bytes += size
                while self.held_bytes > self.max_bytes:
                    self.held_bytes -= self._held.popitem(last=False)[1].nbytes
            return made

    def then(self, change: Callable[[Tensor], Tensor]) -> CubeCache:
        """A cache of ``change`` of what this one gives, as large as this one."""
        return CubeCache(functools.partial(_changed, self, change), self.max_bytes)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs: how to read, not what was read."""
        return {"read": self.read, "max_bytes": self.max_bytes, "stored": self.stored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A cache that holds nothing yet."""
        self.__init__(state["read"], state["max_bytes"], state["stored"])


def _changed(cubes: CubeCache, change: Callable[[Tensor], Tensor], name: str) -> Tensor:
    return change(cubes.get(name))


class LazyEpochs(Sequence[Tensor | None]):
    """Epochs of one climate's history: entry k is read when it is asked for; None where there is no such epoch.

    Args:
        names: Name of each epoch's climate, or None.
        cubes: Where they are read.
    """

    def __init__(self, names: Sequence[str | None], cubes: CubeCache) -> None:
        self.names, self.cubes = tuple(names), cubes

    @property
    def present(self) -> tuple[bool, ...]:
        """Which epochs there are; reads none of them."""
        return tuple(name is not None for name in self.names)

    def __len__(self) -> int:
        """Number of epochs, present or not."""
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> LazyEpochs: ...
    def __getitem__(self, index: int | slice) -> Tensor | LazyEpochs | None:
        """float32 [V, T, lev, lat, lon] of one epoch, or None; a slice reads nothing."""
        if isinstance(index, slice):
            return LazyEpochs(self.names[index], self.cubes)
        name = self.names[index]
        return None if name is None else self.cubes.get(name)

    def read_by(self, cubes: CubeCache) -> LazyEpochs:
        """The same epochs read elsewhere."""
        return LazyEpochs(self.names, cubes)
