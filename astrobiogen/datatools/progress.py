"""Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress

Item = TypeVar("Item")
LINE_EVERY = 5.0  # seconds between lines where there is no terminal


def track(items: Iterable[Item], what: str, total: int, label: Callable[[Item], str] = lambda _: "") -> Iterator[Item]:
    """``items`` one by one, showing how many of ``total`` are done.

    Args:
        items: Anything; an item counts as done when the next one is asked for.
        what: Name of the work, "climates".
        total: Number of items, for the share.
        label: Short name of an item.
    """
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(items, what, total, label)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[name]}", style="dim"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, name="")
        for item in items:
            bar.update(task, name=label(item))
            yield item
            bar.advance(task)
        bar.update(task, name="")


def _lines(items: Iterable[Item], what: str, total: int, label: Callable[[Item], str]) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY:
            last = now
            say(f"{what} {done}/{total} ({now - start:.0f} s) {label(item)}".rstrip())


def say(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
