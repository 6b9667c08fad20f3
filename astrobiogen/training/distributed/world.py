"""The processes of one run: who they are, how they agree, and what happens to all when one fails.

`World()` is a run of one process: every method works and none communicates. `World.join()` joins the processes that
torchrun has started. Control messages (flags, sums of losses, gathered predictions) always travel through gloo on the
CPU, so that agreeing on a flag never waits for a GPU; gradients and parameters use NCCL on GPUs.

A process that fails writes why into the store that all of them share before it ends; the others, which notice a closed
connection or a passed time limit at their next exchange, report that reason instead of their own symptom.
"""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from astrobiogen.training.errors import UserError
from astrobiogen.training.launch import launched
from astrobiogen.training.observe.watchdog import within

_LOG = logging.getLogger("astrobiogen")
_FAILED = "astrobiogen/failed/"
# A failing process needs this long at most to write down why, after the others have seen its connection close.
_GRACE_SECONDS = 2.0
# How gloo and NCCL word a lost or silent peer; they raise bare RuntimeErrors.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "timed out",
    "timeout",
    "gloo",
    "nccl",
    "socket",
    "connection refused",
)


class PeerError(UserError):
    """Another process of the run failed, ended or did not answer in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=1)


class World:
    """The processes of one run. A context manager: leaving it by an exception tells the other processes why.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine, which is also the number of its GPU.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        self._store: dist.Store | None = None
        self._control: dist.ProcessGroup | None = None
        self._timeout = datetime.timedelta(minutes=10)

    @classmethod
    def join(cls, minutes: float, cuda: bool) -> Self:
        """The world that torchrun's variables describe; a world of one without them.

        Args:
            minutes: after this long without an answer from the others an exchange fails.
            cuda: exchange gradients on GPUs, through NCCL.

        Raises:
            PeerError: the others do not appear in time.
        """
        world = cls()
        if not launched():
            return world
        world.rank, world.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        world.local_rank = int(os.environ.get("LOCAL_RANK", world.rank))
        world._timeout = datetime.timedelta(minutes=minutes)
        if cuda:
            torch.cuda.set_device(world.local_rank)
        with world._exchange("meeting the other processes"):
            # A program that holds the port and never answers makes the store wait without end, whatever its timeout.
            meeting = dist.rendezvous("env://", world.rank, world.size, timeout=world._timeout)
            world._store = within(60.0 * minutes + _GRACE_SECONDS, lambda: next(iter(meeting)))[0]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore("astrobiogen/group", world._store),
                rank=world.rank,
                world_size=world.size,
                timeout=world._timeout,
            )
            group = dist.new_group(backend="gloo", timeout=world._timeout)
            assert isinstance(group, dist.ProcessGroup)  # an integer in processes outside the group; none is
            world._control = group
        return world

    def twin(self) -> "World":
        """The same processes with a line of their own, for exchanges in another thread; every process must call it."""
        other = World()
        other.rank, other.size, other.local_rank = self.rank, self.size, self.local_rank
        other._store, other._timeout = self._store, self._timeout
        if self._control is not None:
            group = dist.new_group(backend="gloo", timeout=self._timeout)
            assert isinstance(group, dist.ProcessGroup)
            other._control = group
        return other

    @property
    def main(self) -> bool:
        """Whether this is the process that logs, writes the run folder and speaks to the user."""
        return self.rank == 0

    @property
    def control(self) -> dist.ProcessGroup | None:
        """The group of the control messages: gloo, on the CPU."""
        return self._control

    @property
    def distributed(self) -> bool:
        """Whether there is a process group (also of one process, under torchrun)."""
        return self._control is not None

    # ---- exchanges: each must be reached by every process, in the same order

    @contextlib.contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        try:
            yield
        # gloo and NCCL raise RuntimeErrors, a bad MASTER_PORT a ValueError, a port that is silent a TimeoutError
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise PeerError(self._reason(what, error)) from error

    def _reason(self, what: str, error: BaseException) -> str:
        """What the others have written down about their end, else the symptom."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            for rank in range(self.size):
                if rank != self.rank and (text := self._written(rank)):
                    return f"process {rank} of {self.size} failed: {text}"
            time.sleep(0.05)
        minutes = self._timeout.total_seconds() / 60
        return (
            f"{what}: another of the {self.size} processes ended, or did not answer within {minutes:g} minutes "
            f"(distributed.timeout_minutes); this process saw: {' '.join(str(error).split())[:200]}"
        )

    def _written(self, rank: int) -> str:
        """Why process `rank` failed, if it has written it down."""
        if self._store is None:
            return ""
        try:
            key = f"{_FAILED}{rank}"
            return self._store.get(key).decode() if self._store.check([key]) else ""
        except RuntimeError:  # the store went down with the process that held it
            return ""

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all processes. With flags and signal numbers: whether any, and which."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self._control is None or not values:
            return list(values)
        shared = torch.tensor(list(values), dtype=torch.float64)
        with self._exchange("agreeing"):
            dist.all_reduce(shared, operation, group=self._control)
        return shared.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in at least one process."""
        return self.maximum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in every process. Pickled between processes of one run only."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange("gathering"):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of process 0."""
        if self._control is None:
            return value
        values = [value]
        with self._exchange("receiving from process 0"):
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.maximum([0.0])

    # ---- work that all must survive, or none

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` in every process and return all results; if it fails anywhere it fails everywhere.

        Raises:
            OSError: the first process's that failed, by rank, with its text; a full disk stays a full disk.
            PeerError: another kind of failure in another process; a process's own failure is raised as it is.
        """
        failure: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:  # raised again below, after all processes know
            failure = error
        if self._control is None:
            if failure is not None:
                raise failure
            return [result]
        answers = self.gather((result, _portable(failure)))
        if failure is not None:
            raise failure
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise _revived(error, rank, self.size)
        return [result for result, _ in answers]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` in process 0 only and give every process its result, or its failure."""
        return self.together(work if self.main else lambda: None)[0]

    # ---- the end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if self._control is None:
            return
        if error is None:
            dist.destroy_process_group()
            self._control = None
            return
        # The group is not destroyed here: that can wait for peers that will never come. The process ends soon.
        if isinstance(error, PeerError):
            return
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and _is_lost_peer(error):
            raise PeerError(self._reason("exchanging gradients or parameters", error)) from error
        self.write_down(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def write_down(self, text: str) -> None:
        """Leave the reason of this process's end for the others."""
        if self._store is None:
            return
        try:
            self._store.set(f"{_FAILED}{self.rank}", text)
        except RuntimeError as error:
            _LOG.debug("the other processes could not be told: %s", error)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of `tensor`: its shard, or all of an ordinary tensor. Shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_lost_peer(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _LOST_PEER)


def _portable(error: Exception | None) -> tuple[int | None, str] | None:
    """An exception as (errno, text)."""
    if error is None:
        return None
    number = error.errno if isinstance(error, OSError) else None
    return number, " ".join(str(error.strerror if number and isinstance(error, OSError) else error).split())[:500]


def _revived(error: tuple[int | None, str], rank: int, size: int) -> Exception:
    number, text = error
    if number is not None:
        return OSError(number, f"{text} (process {rank} of {size})")
    return PeerError(f"process {rank} of {size} failed: {text}")
