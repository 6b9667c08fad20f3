"""A sampler without state: the batches are a function of (seed, epoch, rank)."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class EpochSampler:
    """Batches of indices for one rank.

    The permutation depends on (seed, epoch) only; ranks take consecutive slices of each global batch of ``batch_size *
    world_size``, so the union over ranks of batch k is the same whatever the number of ranks at equal global batch
    size. The last global batch wraps round to the start of the same permutation when shuffling, so that every rank
    runs equally many full batches; without shuffling (validation, test) each index comes exactly once, the last
    batches may be short and, with several ranks, missing on some.

    Args:
        n: Number of samples, >= 1.
        batch_size: Per rank, >= 1.
        seed: Any integer.
        rank, world_size: 0 <= rank < world_size.
        shuffle: False gives the order 0 .. n - 1.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, shuffle: bool = True
    ) -> None:
        for name, value in (("n", n), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle

    @property
    def batches_per_epoch(self) -> int:
        """Batches that this rank gets per epoch; the same on all ranks when shuffling."""
        stride = self.batch_size * self.world_size
        if self.shuffle:
            return -(-self.n // stride)
        return sum(1 for start in range(0, self.n, stride) if start + self.rank * self.batch_size < self.n)

    def order(self, epoch: int) -> list[int]:
        """The permutation of 0 .. n - 1 of an epoch."""
        if not self.shuffle:
            return list(range(self.n))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.n, generator=generator).tolist()

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Batches of ``epoch`` from number ``start`` on (``start`` = batches already consumed in this epoch)."""
        if start < 0:
            raise ValueError(f"start is {start}, expected at least 0")
        order = self.order(epoch)
        stride = self.batch_size * self.world_size
        for k in range(start, self.batches_per_epoch):
            first = k * stride + self.rank * self.batch_size
            if self.shuffle:
                yield [order[i % self.n] for i in range(first, first + self.batch_size)]
            else:
                yield order[first : first + self.batch_size]
