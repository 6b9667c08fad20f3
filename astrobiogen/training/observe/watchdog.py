"""Ends a run that hangs, and says what hung: a limit of time for each section of it.

A thread looks after the sections that are open. When one is over its limit, it tells on stderr and in
`hang-process-<rank>.txt` which section, for how long, in which process, with the stacks of all threads, tells the
other processes, ends the data-loading processes and leaves with exit code 3. Checkpoints committed before stay as they
are.

It must not hang itself, whatever does: it takes no lock that training takes, and each thing that it does at the end
runs in a thread of its own that is left behind after a few seconds. If something holds the interpreter's lock, a timer
of `faulthandler` outside of it writes the stacks to stderr and ends the process (exit code 1).
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from astrobiogen.training.config.watch import HangConfig

Item = TypeVar("Item")
EXIT_HUNG = 3
SECTIONS = ("setup", "data", "step", "validation", "save", "examination")
# Each of the last deeds may take this long.
_DEED_SECONDS = 5.0
_LONGEST_LOOK = 5.0
# A process that holds the interpreter's lock gets this much more than its section's limit.
_GRACE_SECONDS = 60.0
_GO_ON = "checkpoints saved before are whole, go on with --resume"
NOTHING_LOST = "nothing was trained, so nothing is lost"


class Section:
    """A part of the run that is going on; `beat` says that it is getting on."""

    __slots__ = ("age", "limit", "name")

    def __init__(self, name: str, limit: float) -> None:
        self.name, self.limit, self.age = name, limit, 0.0

    def beat(self) -> None:
        """Begin the limit anew."""
        self.age = 0.0


def limits_of(config: HangConfig) -> dict[str, float]:
    """Seconds of each section that has a limit."""
    minutes = {
        "setup": config.setup_minutes,
        "data": config.data_minutes,
        "step": config.step_minutes,
        "validation": config.validation_minutes,
        "save": config.save_minutes,
        "examination": config.examination_minutes,
    }
    return {name: 60.0 * value for name, value in minutes.items() if value}


class Watchdog:
    """Watches over the sections of one process; a context manager.

    Args:
        folder: where the stacks are written; None: to stderr only.
        limits: seconds by section; sections without a limit are not watched.
        process: this process as the message names it.
        tell: given the message, tells the other processes; may hang.
        leave: ends the process.
        advice: what the message says can be done.
    """

    def __init__(
        self,
        folder: Path | None,
        limits: dict[str, float],
        process: tuple[int, int] = (0, 1),
        tell: Callable[[str], None] = lambda _text: None,
        leave: Callable[[int], Any] = os._exit,
        advice: str = _GO_ON,
    ) -> None:
        self._folder, self._limits, self._process = folder, limits, process
        self._tell, self._leave, self._advice = tell, leave, advice
        self._open: dict[int, list[Section]] = {}  # by thread; only the innermost of each is watched
        self._look = min([_LONGEST_LOOK, *(limit / 10 for limit in limits.values())])
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stderr = -1

    def __enter__(self) -> Self:
        if self._limits:
            with contextlib.suppress(OSError):  # without stderr there is nobody to tell
                self._stderr = os.dup(2)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._stderr >= 0:
            os.close(self._stderr)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[Section]:
        """What runs inside may take as long as the limit of section `name`, or as long from one `beat` to the next. A
        section inside it has a limit of its own, and its time does not count here.
        """
        section = Section(name, self._limits.get(name, math.inf))
        stack = self._open.setdefault(threading.get_ident(), [])
        stack.append(section)
        try:
            yield section
        finally:
            stack.pop()

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, the wait for each of which is a section of its own."""
        iterator = iter(items)
        while True:
            with self.section(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    # ---- the thread

    def _watch(self) -> None:
        looked = time.monotonic()
        armed = False
        while not self._stop.wait(self._look):
            now = time.monotonic()
            # A process that was stopped (SIGSTOP, a debugger, a sleeping machine) did not hang all that time.
            passed, looked = min(now - looked, 2 * self._look), now
            left = []
            for stack in list(self._open.values()):
                for section in stack[-1:]:
                    section.age += passed
                    left.append(section.limit - section.age)
                    if section.age >= section.limit:
                        self._end(section)
                        return
            armed = self._arm(min(left, default=math.inf), armed)
        if armed:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, left: float, armed: bool) -> bool:
        """Set the timer that works without the interpreter's lock; it is put off again and again while all is well."""
        if left == math.inf or self._stderr < 0:
            if armed:
                faulthandler.cancel_dump_traceback_later()
            return False
        seconds = max(left, 0.0) + 4 * self._look + min(_GRACE_SECONDS, max(self._limits.values()))
        faulthandler.dump_traceback_later(seconds, file=self._stderr, exit=True)
        return True

    def _end(self, section: Section) -> None:
        rank, size = self._process
        file = None if self._folder is None else self._folder / f"hang-process-{rank}.txt"
        where = f"; stacks of all threads: {file}" if file else ""
        text = (
            f"process {rank} of {size} hung: section {section.name!r} made no progress for {section.age:.3g} s "
            f"(hang.{section.name}_minutes {section.limit / 60:g})"
        )
        said = f"error: {text}; {self._advice}{where}\n"
        self._arm(5 * _DEED_SECONDS, armed=True)
        try:
            _in_time(lambda: self._say(said))
            _in_time(lambda: self._write(file, f"{text}\n\n{stacks()}"))
            _in_time(lambda: self._tell(text))
            _in_time(end_children)
        finally:
            self._leave(EXIT_HUNG)

    def _say(self, text: str) -> None:
        os.write(self._stderr if self._stderr >= 0 else 2, text.encode())

    def _write(self, file: Path | None, text: str) -> None:
        if file is None:
            self._say(text)
        else:
            file.write_text(text, encoding="utf-8")


def stacks() -> str:
    """The Python stacks of all threads, by `faulthandler`; written into memory first, where nothing can stall."""
    descriptor = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return os.read(descriptor, 1 << 20).decode(errors="replace")
    finally:
        os.close(descriptor)


def end_children() -> None:
    """Kill this process's own children (data loading): SIGABRT, at which they write their stacks to stderr, then
    SIGKILL.
    """
    children = multiprocessing.active_children()
    for number, pause in ((signal.SIGABRT, 0.5), (signal.SIGKILL, 0.0)):
        for child in children:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, number)
        time.sleep(pause if children else 0.0)


def _in_time(deed: Callable[[], object]) -> None:
    """Do `deed` in a thread that is left behind if it does not come back."""

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the process ends in any case
            deed()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_DEED_SECONDS)


def within(seconds: float, work: Callable[[], Item]) -> Item:
    """The result of `work`, which cannot be interrupted and may wait for ever.

    Raises:
        TimeoutError: it has not come back in time; its thread is left behind.
    """
    results: list[Item] = []
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=attempt, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return results[0]


def enable_worker_stacks() -> None:
    """In a data-loading process: write the stacks to stderr at SIGABRT, by which a hung one is ended."""
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
