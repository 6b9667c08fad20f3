"""From sample numbers to batches on the device, in an order that does not depend on how they are prepared."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from astrobiogen.training.distributed import runtime
from astrobiogen.training.observe.watchdog import enable_worker_stacks
from astrobiogen.training.types import Batch

Collate = Callable[[list[Any]], Batch]


class Sampler(Protocol):
    """What the loop needs of `astrobiogen.data.EpochSampler`: the order is a function of (seed, epoch) only."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch, the same for each."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Sample numbers of each batch of `epoch`, the first `start` batches left out."""
        ...


class Samples(Protocol):
    """A data set: a length and a sample for each number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor (and graph batch) inside it on `device`."""
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple | str | int | float) or value is None:
        return value
    return value.to(device, non_blocking=True)


def _collated(samples: Samples, collate: Collate, order: Iterable[list[int]]) -> Iterator[Batch]:
    for indices in order:
        yield collate([samples[index] for index in indices])


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Batch systems and terminals signal the whole process group: a worker that died of it would end the training
    process before it has saved. Workers end when the parent tells them to, or is gone.
    """
    for number in runtime.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    enable_worker_stacks()


def load_batches(
    samples: Samples, collate: Collate, order: Sequence[list[int]], device: torch.device, workers: int = 0
) -> Iterator[tuple[list[int], Batch]]:
    """Each batch of `order` with its sample numbers. Draws nothing from the global generators."""
    if workers:
        # A generator of its own: DataLoader would otherwise draw its base seed from the global one and shift every
        # later draw.
        source: Iterable[Batch] = DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
    else:
        source = _collated(samples, collate, order)
    for indices, batch in zip(order, source, strict=True):
        yield indices, to_device(batch, device)


def in_order(count: int, batch_size: int) -> list[list[int]]:
    """Batches of 0 .. count - 1 in order, the last one possibly short."""
    return [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
