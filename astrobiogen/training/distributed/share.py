"""How the processes share the samples of an update.

The order of the samples and what makes an update (`data.batch_size` x `data.accumulation` samples) do not depend on
the number of processes: in each round they take the next gcd(accumulation, processes) micro-batches of the one order
that a single process would follow, and share their samples evenly. So the same configuration is the same training on
1, 2 or 8 processes, up to rounding, and a run can go on with another number of processes than it began with.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Round:
    """One forward and backward pass of every process.

    Attributes:
        parts: sample numbers by rank; empty where a process has nothing to do.
        batches: micro-batches of the order that the round covers.
        window: sample numbers of the whole update that the round belongs to.
        closes: whether it is the last round of its update.
    """

    parts: tuple[tuple[int, ...], ...]
    batches: int
    window: tuple[int, ...]
    closes: bool

    @classmethod
    def alone(cls, indices: Sequence[int], closes: bool = True) -> "Round":
        """A micro-batch of a single process."""
        return cls((tuple(indices),), 1, tuple(indices), closes)

    @property
    def samples(self) -> int:
        """Samples of all processes."""
        return sum(len(part) for part in self.parts)

    def share(self, rank: int) -> list[int]:
        """Samples that process `rank` runs. One without samples of its own runs those of another (with weight 0),
        since every process must take part in every exchange of gradients."""
        return list(self.parts[rank] or next(part for part in self.parts if part))


def rounds(order: Sequence[Sequence[int]], start: int, accumulation: int, processes: int) -> list[Round]:
    """The rounds of an epoch from micro-batch `start` on.

    Args:
        order: micro-batches of the epoch.
        start: how many of them are done; may lie inside an update.
        accumulation: micro-batches per update.
        processes: number of processes.
    """
    together = math.gcd(accumulation, processes)
    found: list[Round] = []
    position = start
    while position < len(order):
        first = position // accumulation * accumulation
        end = min(first + accumulation, len(order))
        stop = min(position + together, end)
        window = tuple(index for batch in order[first:end] for index in batch)
        samples = [index for batch in order[position:stop] for index in batch]
        found.append(Round(_divided(samples, processes), stop - position, window, stop == end))
        position = stop
    return found


def _divided(samples: list[int], processes: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive parts whose sizes differ by one at most, the larger ones first."""
    size, larger = divmod(len(samples), processes)
    bounds = [rank * size + min(rank, larger) for rank in range(processes + 1)]
    return tuple(tuple(samples[bounds[rank] : bounds[rank + 1]]) for rank in range(processes))


def shared_order(order: Sequence[Sequence[int]], rank: int, processes: int) -> list[tuple[list[int], bool]]:
    """Batches of a pass without gradients for process `rank`: every `processes`-th one, and whether it counts.

    All processes get equally many, since a sharded model needs all of them in every forward pass; the last ones may
    be repetitions that do not count.
    """
    mine: list[tuple[list[int], bool]] = []
    for first in range(0, len(order), processes):
        counts = first + rank < len(order)
        mine.append((list(order[first + rank if counts else first]), counts))
    return mine
