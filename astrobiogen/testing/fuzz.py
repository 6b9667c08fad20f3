"""The raw fuzzer: calls `torch.ops.astrobiogen.*` with wrong, odd and extreme arguments; counts what ends the process.

Valid calls, forward and backward, are recorded from the cases of every operator and changed at random: axes, sizes,
strides, dtypes, devices, layouts, values, integers, lists, None. Each tensor lies next to a page that nobody may touch.
The calls run in a forked process, so that a signal or a call that does not come back is counted and the next one runs.
A call that is accepted must give what the plain reference gives.

    python -m astrobiogen.testing.fuzz --calls 10000            # all operators; exit code 1 if anything was found
    python -m astrobiogen.testing.fuzz --op swiglu --seed 3
    python -m astrobiogen.testing.fuzz --seed 3 --only 1234     # one call of that series, in this process
    python -m astrobiogen.testing.fuzz --library aten           # PyTorch's own operators, to compare with

Under AddressSanitizer (`make fuzz-asan`) the sanitizer's red zones replace the forbidden pages.
"""

import argparse
import dataclasses
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from astrobiogen.kernels import registry
from astrobiogen.testing.fuzzing import calls as valid_calls
from astrobiogen.testing.fuzzing import report, worker
from astrobiogen.testing.fuzzing.calls import Call
from astrobiogen.testing.fuzzing.memory import Arena
from astrobiogen.testing.fuzzing.worker import ACCEPTED, REFUSED, WRONG

HANG, SANITIZER, ELSEWHERE = "hang", "sanitizer", "elsewhere"
FOUND = ("signal", HANG, SANITIZER, WRONG)
# What AddressSanitizer ends the process with (`exitcode` in ASAN_OPTIONS).
SANITIZER_CODE = 77
BUILDING, RUNNING, COMPARING = range(3)
POLL_SECONDS = 0.01
# A call that waits for something instead of working is given this many times longer.
IDLE_FACTOR = 20.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one call.

    Attributes:
        index: of the call in its series.
        outcome: "refused", "accepted", "wrong", "signal", "hang", "sanitizer", or "elsewhere" (the process ended while
            the call was made or in the plain reference, not in the operator).
        why: the error, the signal, what is wrong.
        op: the operator.
        call: the call in words.
    """

    index: int
    outcome: str
    why: str
    op: str = ""
    call: str = ""


class Progress:
    """Which call a worker is at, and what it found, in memory and a file that outlive it."""

    def __init__(self) -> None:
        self.place = mmap.mmap(-1, mmap.PAGESIZE)
        self.results = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115

    def note(self, index: int, phase: int) -> None:
        """Called by the worker."""
        self.place[:16] = struct.pack("=qq", index, phase)

    def at(self) -> tuple[int, int]:
        """(index, phase)."""
        index, phase = struct.unpack("=qq", self.place[:16])
        return index, phase

    def running(self, index: int, op: str, call: str) -> None:
        """Called by the worker before each call."""
        self._add("call", index, op, call)
        self.note(index, RUNNING)

    def add(self, index: int, outcome: str, why: str) -> None:
        """Called by the worker after each call."""
        self._add("verdict", index, outcome, why)

    def verdicts(self) -> list[Verdict]:
        """All that was added, in order."""
        self.results.seek(0)
        calls: dict[str, tuple[str, str]] = {}
        found: list[Verdict] = []
        for line in self.results:
            kind, index, first, second = line.decode().rstrip("\n").split("\t", 3)
            if kind == "call":
                calls[index] = first, second
            else:
                found.append(Verdict(int(index), first, second, *calls.get(index, ("", ""))))
        return sorted(found, key=lambda verdict: verdict.index)

    def complaint(self) -> str:
        """What the last worker wrote to standard error, the sanitizer's summary first; then forgotten."""
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        os.truncate(self.errors.fileno(), 0)
        os.lseek(self.errors.fileno(), 0, os.SEEK_SET)
        lines = [line for line in text.splitlines() if "SUMMARY" in line or "runtime error" in line]
        return "; ".join(lines) or text[-2000:]

    def _add(self, kind: str, index: int, first: str, second: str) -> None:
        """Written at once: the process may end any time."""
        line = "\t".join((kind, str(index), first, " ".join(second.split())))
        os.write(self.results.fileno(), line.encode(errors="replace") + b"\n")


Runner = Callable[[int, Progress], tuple[str, str]]


def drive(run: Runner, indices: Sequence[int], timeout: float, sanitized: bool = False) -> list[Verdict]:
    """Run each of `indices` in a worker, and go on in a new one where it ends or works on one for `timeout` seconds.

    Raises:
        RuntimeError: the fuzzer itself failed in a worker.
    """
    progress, rest = Progress(), list(indices)
    while rest:
        progress.note(rest[0], BUILDING)
        child = os.fork()
        if child == 0:
            _work(run, rest, progress, sanitized)
        status = _wait(child, progress, timeout)
        if status == 0:
            break
        index, phase = progress.at()
        progress.add(index, *_ended(index, phase, status, progress.complaint()))
        rest = rest[rest.index(index) + 1 :]
    return progress.verdicts()


def _work(run: Runner, indices: Sequence[int], progress: Progress, sanitized: bool) -> None:
    """The worker's whole life; never returns."""
    code = 70
    os.dup2(progress.errors.fileno(), 2)
    try:
        worker.confine(sanitized)
        for index in indices:
            progress.note(index, BUILDING)
            progress.add(index, *run(index, progress))
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


def _wait(child: int, progress: Progress, timeout: float) -> int | None:
    """The wait status of `child`; None for one that was at one call too long and was ended."""
    last, worked, begin = progress.at(), _worked(child), time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if progress.at() != last:
            last, worked, begin = progress.at(), _worked(child), time.monotonic()
        if _worked(child) - worked > timeout or time.monotonic() - begin > IDLE_FACTOR * timeout:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(POLL_SECONDS)


def _worked(child: int) -> float:
    """Seconds of processor time of a process: on a busy machine a call that is not being run is no hang."""
    with open(f"/proc/{child}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ended(index: int, phase: int, status: int | None, complaint: str) -> tuple[str, str]:
    """(outcome, why) of the call at which a worker ended."""
    inside = phase == RUNNING
    if status is None:
        return HANG if inside else ELSEWHERE, "did not come back"
    if os.WIFSIGNALED(status):
        return "signal" if inside else ELSEWHERE, signal.Signals(os.WTERMSIG(status)).name
    if os.WEXITSTATUS(status) == SANITIZER_CODE:
        return SANITIZER if inside else ELSEWHERE, complaint
    raise RuntimeError(f"the fuzzer failed at call {index}: {complaint}")


def runner(calls: Sequence[Call], seed: int, sanitized: bool) -> Runner:
    """Runs call `index` of the series `seed`."""
    arena = None if sanitized else Arena()

    def run(index: int, progress: Progress) -> tuple[str, str]:
        call, mutant, draw = worker.prepare(calls, seed, index)
        arguments = worker.place(mutant.arguments, arena, draw)
        progress.running(index, call.name, worker.text_of(call, mutant))
        got, why = worker.attempt(call, arguments)
        if got is None:
            return REFUSED, why
        if not call.op.startswith(registry.NAMESPACE):
            return ACCEPTED, ""
        progress.note(index, COMPARING)
        text = worker.compare(call, mutant, arguments, got)
        return (WRONG, text) if text else (ACCEPTED, "")

    return run


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sanitizer_is_loaded() -> bool:
    """True under AddressSanitizer."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.testing.fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--calls", type=int, default=10_000, help="how many (default 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the series of calls (default 0)")
    parser.add_argument("--op", action="append", default=[], help="only this operator; may be repeated")
    parser.add_argument("--library", choices=("astrobiogen", "aten"), default="astrobiogen")
    parser.add_argument("--only", type=int, help="run one call of the series in this process and print it")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds of work after which a call hangs")
    parser.add_argument("--update", type=Path, help="write the figures into this Markdown file's table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    calls = [call for call in valid_calls.record(options.library) if not options.op or call.name in options.op]
    if not calls:
        parser.error(f"no operator {options.op} in {options.library}")
    sanitized = sanitizer_is_loaded()
    run = runner(calls, options.seed, sanitized)
    if options.only is not None:
        call, mutant, _ = worker.prepare(calls, options.seed, options.only)
        say(worker.text_of(call, mutant))
        say(": ".join(run(options.only, Progress())))
        return 0
    begin = time.monotonic()
    verdicts = drive(run, range(options.calls), options.timeout, sanitized)
    for verdict in verdicts:
        if verdict.outcome not in (REFUSED, ACCEPTED):
            say(f"{verdict.outcome} at {verdict.index}: {verdict.why}: {verdict.call}")
    counts: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        counts.setdefault(verdict.op, Counter())[verdict.outcome] += 1
    say(report.table(counts))
    say(f"{len(verdicts):,} calls of seed {options.seed} in {time.monotonic() - begin:.0f} s")
    if options.update is not None:
        report.update(options.update, options.library, sanitized, options.seed, counts)
    bad = sum(counts[op][outcome] for op in counts for outcome in FOUND)
    return int(bad > 0 and options.library == registry.NAMESPACE)


if __name__ == "__main__":
    sys.exit(main())
