"""Several files one after the other: a bad one is listed and stops no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.fetch.download import NoAnswerError
from astrobiogen.datatools.progress import say

Item = TypeVar("Item")


@dataclass(frozen=True)
class Fetched:
    """Files that are there now, and what could not be had."""

    paths: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def each(items: Sequence[Item], what: str, one: Callable[[Item], Path]) -> Fetched:
    """``one(item)`` for every item.

    Raises:
        NoAnswerError: The service cannot be reached: the other items are not tried. What was fetched stays.
    """
    made = Fetched()
    for k, item in enumerate(items, 1):
        say(f"{what} {k}/{len(items)}: {item}")
        try:
            made.paths.append(one(item))
        except NoAnswerError:
            raise
        except DataError as error:
            made.problems.append(str(error))
    return made
