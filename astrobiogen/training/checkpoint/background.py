"""Saving in the background: the state is copied to host memory at once, and a thread writes the copy.

Training waits for the copy only. One save is written at a time, by the same protocol as any other; the next one, and
the end of the run, wait for it.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from astrobiogen.training.checkpoint.store import Content
from astrobiogen.training.distributed import local_part


class HostCopy:
    """Copies the tensors of a checkpoint into host memory, which it keeps for the next one: as much as a checkpoint
    has bytes, page-locked where they come from a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, content: Content) -> Content:
        """`content` as it is now, whatever becomes of its tensors. Valid until the next call."""
        seen: dict[tuple[Any, ...], torch.Tensor] = {}
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for stem, named in content.tensors.items():
            tensors[stem] = {}
            for name, tensor in named.items():
                part = local_part(tensor.detach())
                place = (part.device, part.data_ptr(), tuple(tensor.shape), part.stride(), part.dtype)
                if not part.numel() or place not in seen:  # tied weights stay tied
                    seen[place] = self._copy((stem, name), tensor.detach())
                tensors[stem][name] = seen[place]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dataclasses.replace(content, tensors=tensors)

    def _copy(self, key: tuple[str, str], tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):  # a shard knows its place in the whole; a buffer does not
            return tensor.to("cpu", copy=True) if tensor.to_local().is_cuda else tensor.clone()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclasses.dataclass
class Job:
    """A save that was handed over.

    Attributes:
        step, why: of which state, and for what reason.
        stall: seconds that training waited.
        seconds: from the beginning to the commit.
        result: what the work returned.
        failure: what it raised.
    """

    step: int
    why: str
    stall: float
    started: float
    seconds: float = 0.0
    result: Any = None
    failure: BaseException | None = None


class Background:
    """Does one job at a time in a thread."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._thread: threading.Thread | None = None

    def start(self, job: Job, work: Callable[[], Any]) -> None:
        """Begin `work`; the job before must have been taken."""
        assert self._job is None

        def run() -> None:
            try:
                job.result = work()
            except BaseException as error:  # told by whoever takes the job
                job.failure = error
            job.seconds = time.monotonic() - job.started

        self._job = job
        # Not a daemon: whatever ends the main thread, the interpreter waits for the save.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def take(self, wait: bool) -> Job | None:
        """The job, if it is done; with `wait` it is waited for. None if there is none."""
        if self._job is None or self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        job, self._job, self._thread = self._job, None, None
        return job
