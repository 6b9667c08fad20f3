"""What the emulator reports."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """One kind of fault at one place of a kernel.

    Attributes:
        what: e.g. ``"shared memory: read after another warp's write without a barrier"``.
        where: source line, as far as the compiler says so.
        count: instructions at which it was seen; one instruction stands for all threads that meet it together.
    """

    what: str
    where: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.what} at {self.where or 'an unknown line'} ({self.count} times)"


@dataclasses.dataclass(frozen=True)
class KernelRun:
    """One launch.

    Attributes:
        kernel: name.
        grid: blocks.
        instructions: run, one for all threads that ran it together.
        findings: what was found.
        fault: why it ended early, or "".
    """

    kernel: str
    grid: tuple[int, int, int]
    instructions: int
    findings: tuple[Finding, ...]
    fault: str = ""


class KernelError(Exception):
    """A kernel does what ends it on a GPU too: an address outside its tensors, a misaligned one, a barrier that not
    all threads reach."""


class Findings:
    """Counts findings while a kernel runs."""

    def __init__(self) -> None:
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, what: str, where: str) -> None:
        """Note one occurrence."""
        self._counts[what, where] += 1

    def all(self) -> tuple[Finding, ...]:
        """What was noted, sorted."""
        return tuple(sorted(Finding(what, where, count) for (what, where), count in self._counts.items()))
