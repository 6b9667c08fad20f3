"""The `bench` fixture's object: verifies, times and records all candidates of one op at one size."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astrobiogen.testing import inputs, tolerance
from benchmarks import graphs, harness
from benchmarks.harness import Call, Candidate, Mode, Problem, Row, Samples, Work
from benchmarks.placement import Placement

# These must be right; a peer may be anything.
OWN = ("ours", "eager")
COPY, MM = "(copy of the same bytes)", "(torch.mm)"

# Largest error per mode, of the candidate and of the eager reference.
Checked = tuple[dict[Mode, float], dict[Mode, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one placement gave: samples and seconds on the device (where these are known) per call."""

    times: dict[str, Samples]
    device: dict[str, float]
    mm_flops: float

    def seconds(self, name: str) -> float:
        """On the device, or else by the clock."""
        return self.device.get(name, self.times[name].median())


class Bench:
    """Measures an op on one device and appends its rows to the session's table."""

    def __init__(
        self,
        device: torch.device,
        quick: bool,
        rows: list[Row],
        keep: Callable[[], None] = lambda: None,
        record: Callable[[Row, Samples], None] | None = None,
    ) -> None:
        """`record` is called with each row that was timed and its rounds, `keep` whenever rows were added."""
        self.keep = keep
        self.recorder = record
        self.device = device
        self.settings = harness.QUICK if quick else harness.Settings()
        self.quick = quick
        self.rows = rows

    def __call__(
        self,
        *,
        op: str,
        size: str,
        dtype: torch.dtype,
        arguments: dict[str, Any],
        differentiable: Sequence[str],
        ours: Callable[..., Any],
        reference: Callable[..., Any],
        work: Work,
        peers: Sequence[Candidate] = (),
        modes: Sequence[Mode] = ("forward", "backward"),
        truth: Callable[..., Any] | None = None,
        without_compile: str = "",
        verified: dict[str, Any] | None = None,
    ) -> list[Row]:
        """Verify every candidate against fp64, then time all of them in turns.

        Args:
            op: name of the op, and of the result file.
            size: e.g. "2048x4352".
            dtype: of the arguments, for the record.
            arguments: of every candidate, by name, on the bench's device.
            differentiable: names whose gradients the backward takes.
            ours: the public function.
            reference: the plain PyTorch definition; timed as "eager" and, without --quick, under `torch.compile` as
                "compile".
            work: least bytes and flops of one call.
            peers: further candidates, see `benchmarks.peers`.
            modes: what to time.
            truth: fp64 definition, where the timed `reference` cannot serve as one; default: `reference`.
            without_compile: why the compiled reference is left out, if it is.
            verified: arguments to verify on instead, smaller ones where the fp64 truth of the timed ones would take
                minutes.

        Returns:
            The rows that were added.

        Raises:
            AssertionError: ours is wrong. A wrong peer becomes a row "wrong: ...".
        """
        candidates = [
            Candidate("ours", ours),
            Candidate("eager", reference),
            self._compiled(reference, without_compile),
            *peers,
        ]
        subject = tolerance.Subject(op, size, dtype)
        problem = self._problem(arguments, differentiable, reference)
        small = problem if verified is None else self._problem(verified, differentiable, reference)
        expected = harness.Expected.of(truth or reference, small, modes)
        # an eager that is not the definition, such as a fused kernel of PyTorch's, rounds in its own way
        strict = ("ours",) if truth else OWN
        checked, status = self._verified(candidates, strict, expected, small, subject)
        del expected, small  # fp64 values and gradients, whose memory the placements need
        right = [candidate for candidate in candidates if candidate.function is not None and candidate.name in checked]
        added: list[Row] = []
        for mode in modes:
            failed = dict(status)
            calls = self._prepared(right, problem, mode, failed)
            few = {candidate.name: candidate.rounds for candidate in right if candidate.rounds}
            memory = {
                name: harness.added_memory(call, self.device) / 2**20 for name, call in calls.items() if name not in few
            }
            timed = [candidate for candidate in right if candidate.name in calls]
            del calls  # it holds a graph per candidate, whose memory the placements need
            n_bytes, flops = work.of(mode)
            # a call that is bound by its arithmetic takes the same time anywhere
            places = self.settings.placements if self.device.type == "cpu" and not flops else 1
            runs = self._placed(timed, problem, mode, n_bytes, dtype, places)
            added += self._rows(subject, mode, runs, flops, checked, memory)
            added += [Row(op, size, short_name(dtype), mode, name, text) for name, text in failed.items()]
        self.add(added)
        return added

    def record(self, row: Row, sample: Samples) -> None:
        """Hand over the rounds behind a row."""
        if self.recorder is not None:
            self.recorder(row, sample)

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows into the session's table."""
        self.rows += rows
        self.keep()

    def _problem(
        self, arguments: dict[str, Any], differentiable: Sequence[str], reference: Callable[..., Any]
    ) -> Problem:
        outputs = inputs.as_tuple(reference(**arguments))
        return Problem(arguments, differentiable, [torch.randn_like(output) for output in outputs])

    def _prepared(
        self, candidates: Sequence[Candidate], problem: Problem, mode: Mode, failed: dict[str, str]
    ) -> dict[str, Call]:
        """The calls of one mode; a peer that raises goes into `failed`."""
        calls: dict[str, Call] = {}
        for candidate in candidates:
            assert candidate.function is not None
            if mode == "backward" and candidate.forward_only:
                failed[candidate.name] = f"absent: {candidate.forward_only}"
                continue
            try:
                call = harness.prepare(candidate.function, problem, mode)
                if not candidate.rounds:
                    call()
            except Exception as error:
                if candidate.name in OWN:
                    raise
                failed[candidate.name] = _failure(error)
            else:
                calls[candidate.name] = call
        return calls

    def _verified(
        self,
        candidates: Sequence[Candidate],
        strict: Sequence[str],
        expected: harness.Expected,
        problem: Problem,
        subject: tolerance.Subject,
    ) -> tuple[dict[str, Checked], dict[str, str]]:
        """Errors of the candidates that are right, and for the others why they will not be timed."""
        checked: dict[str, Checked] = {}
        status: dict[str, str] = {}
        for candidate in candidates:
            if candidate.function is None:
                status[candidate.name] = f"absent: {candidate.absent}"
                continue
            slack = 1.0 if candidate.name in strict else candidate.slack
            try:
                wanted = expected.forward() if candidate.forward_only else expected
                checked[candidate.name] = harness.verify(candidate.function, wanted, problem, subject, slack)
            except Exception as error:
                if candidate.name in OWN:
                    raise
                wrong = isinstance(error, AssertionError)
                status[candidate.name] = f"wrong: {error}" if wrong else _failure(error)
        return checked, status

    def _compiled(self, reference: Callable[..., Any], without: str) -> Candidate:
        if self.quick or without:
            return Candidate("compile", None, without or "left out by --quick")
        torch.compiler.reset()
        return Candidate("compile", torch.compile(reference, fullgraph=True))

    def _placed(
        self,
        candidates: Sequence[Candidate],
        problem: Problem,
        mode: Mode,
        n_bytes: float,
        dtype: torch.dtype,
        count: int,
    ) -> list[Run]:
        """Time the candidates and the machine's limits in turns, at `count` placements one after the other."""
        runs: list[Run] = []
        for seed in range(count):
            place = Placement(seed) if count > 1 else None
            moved = problem if place is None else problem.moved(place)
            calls = {c.name: harness.prepare(c.function, moved, mode) for c in candidates if c.function is not None}
            mm, mm_flops = harness.mm_call(dtype, self.device, self.quick)
            calls |= {COPY: harness.copy_call(n_bytes, self.device, place), MM: mm}
            few = {c.name: c.rounds for c in candidates if c.rounds}
            times = harness.time_in_turns(calls, self.settings.part(count), self.device, few)
            runs.append(Run(times, self._device_times(calls, times), mm_flops))
        return runs

    def _rows(
        self,
        subject: tolerance.Subject,
        mode: Mode,
        runs: Sequence[Run],
        flops: float,
        checked: dict[str, Checked],
        memory: dict[str, float],
    ) -> list[Row]:
        times = {name: Samples() for name in runs[0].times}
        for run in runs:
            for name, sample in run.times.items():
                times[name].extend(sample)
        on_device = {name: statistics.median(run.seconds(name) for run in runs) for name in times}
        mm_rate = runs[0].mm_flops / on_device[MM]
        rows: list[Row] = []
        for name, sample in times.items():
            own = name not in (COPY, MM)
            errors, eager_errors = checked[name] if own else ({}, {})
            has_device = all(name in run.device for run in runs)
            shares = [run.seconds(COPY) / run.seconds(name) for run in runs] if own else [math.nan]
            row = Row(
                subject.op, subject.case, short_name(subject.dtype), mode, name, "ok",
                median_us=sample.median() * 1e6,
                low_us=sample.quantile(0.2) * 1e6,
                high_us=sample.quantile(0.8) * 1e6,
                device_us=on_device[name] * 1e6 if has_device else math.nan,
                against_eager=times["eager"].median() / sample.median() if own else math.nan,
                device_against_eager=on_device["eager"] / on_device[name] if own and has_device else math.nan,
                share_of_copy=statistics.median(shares),
                share_of_mm=flops / on_device[name] / mm_rate if own and flops else math.nan,
                added_mib=memory.get(name, math.nan),
                error=errors.get(mode, math.nan),
                eager_error=eager_errors.get(mode, math.nan),
                rounds=len(sample.wall),
                cpu_share=sum(sample.cpu) / sum(sample.wall) / torch.get_num_threads(),
                share_low=min(shares),
                share_high=max(shares),
                placements=len(runs),
            )  # fmt: skip
            self.record(row, sample)
            rows.append(row)
        return rows

    def _device_times(self, calls: dict[str, Call], times: dict[str, Samples]) -> dict[str, float]:
        if self.device.type != "cuda":
            return {name: sample.processor() for name, sample in times.items()}
        replays = {name: graphs.graphed(call) for name, call in calls.items()}
        replayed = harness.time_in_turns(
            {n: r for n, r in replays.items() if r is not None}, self.settings, self.device
        )
        return {name: sample.median() for name, sample in replayed.items()}


def short_name(dtype: torch.dtype) -> str:
    """E.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def verified_modes(rows: Sequence[Row]) -> set[str]:
    """The modes in which ours and eager were both verified against fp64 and took a positive time."""
    timed = {(row.candidate, row.mode) for row in rows if row.status == "ok" and row.median_us > 0}
    return {mode for name, mode in timed if name == "ours" and ("eager", mode) in timed}


def _failure(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
