"""A pool of processes in which the death of one costs one item.

``concurrent.futures`` ends the whole pool when a worker dies; reading files with native libraries needs better. Each
worker gets one item at a time over a pipe; a worker that dies (or overruns its time) is replaced, and its item's
result is a ``DataError`` that names the item and the signal.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from astrobiogen.data.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
_READY = "ready"
TIME_LIMIT = 600.0  # seconds for one item; the slowest of the 96 BioModels networks takes 9


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Loop of a worker: says that it is ready, then items in, (result, error) out."""
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has no more to do
        pipe.send(_READY)
        while True:
            _answer(function, pipe, pipe.recv())


def _answer(function: Callable[[Any], Any], pipe: Connection, item: Any) -> None:
    try:
        answer = function(item), None
    except DataError as error:
        answer = None, error
    except Exception as error:  # a fault of our own must reach the parent by name, not as a dead pipe
        answer = None, DataError(str(item), "", f"{type(error).__name__}: {error}")
    pipe.send(answer)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int = -1  # the item that it works on, -1: idle
    ready: bool = False  # the interpreter has started; an item's time counts from here
    since: float = 0.0

    def deadline(self, limit: float) -> float:
        """When its item has had ``limit`` seconds."""
        return self.since + limit if self.ready else math.inf


def _context() -> BaseContext:
    """Processes forked from a clean server, which imports this package once (2 s), where the system has that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start(context: BaseContext, function: Callable[[Any], Any]) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(  # type: ignore[attr-defined]
        target=_serve, args=(function, theirs), daemon=True
    )
    process.start()
    theirs.close()  # so that its death shows as the end of the pipe
    return _Worker(process, ours)


def _cause(process: BaseProcess) -> str:
    process.join(5.0)
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def map_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, time_limit: float = TIME_LIMIT
) -> Iterator[Result | DataError]:
    """``function(item)`` for each item, in the order of ``items``; a ``DataError`` in place of a result that failed.

    Args:
        function: A function at the top of a module (it is sent to fresh interpreters); exceptions become ``DataError``.
        items: Anything that can be sent.
        workers: Processes, >= 1.
        time_limit: Seconds after which an item's worker is ended.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    context = _context()
    pool = [_start(context, function) for _ in range(min(workers, len(items)))]
    waiting, done, shown = list(range(len(items)))[::-1], {}, 0
    try:
        while shown < len(items):
            for place, worker in enumerate(pool):
                if worker.number < 0 and waiting:
                    pool[place] = _assign(context, function, worker, waiting.pop(), items)
            _collect(context, function, pool, items, done, time_limit)
            while shown in done:
                yield done.pop(shown)
                shown += 1
    finally:
        for worker in pool:
            worker.pipe.close()  # a living worker sees the end of its pipe and returns
            worker.process.join(5.0)
            if worker.process.is_alive():
                worker.process.kill()


def _assign(
    context: BaseContext, function: Callable[[Any], Any], worker: _Worker, number: int, items: Sequence[Any]
) -> _Worker:
    """Give an item to a worker, replacing one that died idle."""
    try:
        worker.pipe.send(items[number])
    except (BrokenPipeError, OSError):
        worker.pipe.close()
        worker = _start(context, function)
        worker.pipe.send(items[number])
    worker.number, worker.since = number, time.monotonic()
    return worker


def _collect(
    context: BaseContext,
    function: Callable[[Any], Any],
    pool: list[_Worker],
    items: Sequence[Any],
    done: dict[int, Any],
    time_limit: float,
) -> None:
    """Wait for at least one answer, death or overrun; move it to ``done``."""
    busy = [w for w in pool if w.number >= 0]
    left = min(w.deadline(time_limit) for w in busy) - time.monotonic()
    timeout = max(left, 0.0) if math.isfinite(left) else None
    ready = set(multiprocessing.connection.wait([w.pipe for w in busy], timeout))
    for place, worker in enumerate(pool):
        if worker.number < 0:
            continue
        number = worker.number
        if worker.pipe in ready:
            try:
                answer = worker.pipe.recv()
                if answer == _READY:
                    worker.ready, worker.since = True, time.monotonic()
                    continue
                result, error = answer
                done[number] = result if error is None else error
                worker.number = -1
                continue
            except (EOFError, OSError):
                problem = f"the worker process died ({_cause(worker.process)})"
        elif time.monotonic() >= worker.deadline(time_limit):
            worker.process.kill()
            problem = f"not finished after {time_limit:.0f} s"
        else:
            continue
        done[number] = DataError(str(items[number]), "", problem)
        worker.pipe.close()
        pool[place] = _start(context, function)
