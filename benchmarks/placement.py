"""Where a benchmark's operands lie in memory.

On a CPU that decides part of a memory-bound call's time: a load waits for an earlier store whose address ends in the
same twelve bits, and pages compete for cache sets and memory banks. Tensors that are allocated once keep their places
for a whole process, so one process measures one draw: the same kernel took 0.85 to 1.15 of a copy's time over
processes. Every candidate, and the copy, is therefore timed on several sets of tensors at other addresses.
"""

import random
from typing import Any

import torch

# Gaps are this long and up to twice as long, in steps of a cache line: what follows lies on other pages.
GAP_BYTES = 2**20
LINE_BYTES = 64
PAGE_BYTES = 4096


class Placement:
    """One set of addresses; `seed` chooses it. Its gaps are held as long as it lives."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._gaps: list[torch.Tensor] = []

    def gap(self) -> None:
        """Take memory of a random size, so that what is allocated next lies further on."""
        length = GAP_BYTES + LINE_BYTES * self._random.randrange(GAP_BYTES // LINE_BYTES)
        self._gaps.append(torch.empty(length, dtype=torch.uint8))

    def moved(self, value: Any) -> Any:
        """A copy of a tensor with its strides, behind a gap and at a random line of a page (a large block that malloc
        maps on its own would always start at the same one); anything else as it is.
        """
        if not isinstance(value, torch.Tensor):
            return value
        self.gap()
        old = value.untyped_storage()
        shift = LINE_BYTES * self._random.randrange(PAGE_BYTES // LINE_BYTES)
        block = torch.empty(old.nbytes() + PAGE_BYTES, dtype=torch.uint8, device=value.device)
        block[shift : shift + old.nbytes()] = torch.empty(0, dtype=torch.uint8, device=value.device).set_(old)
        offset = value.storage_offset() + shift // value.element_size()
        return value.detach().new_empty(0).set_(block.untyped_storage(), offset, value.size(), value.stride())
