"""The `bench` fixture's object: verifies, times and records all candidates of one op at one size."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astrobiogen.testing import _inputs, _tolerance
from benchmarks import harness
from benchmarks.harness import Call, Candidate, Mode, Row, Samples, Work

# These must be right; a peer may be anything.
OWN = ("ours", "eager")
COPY, MM = "(copy of the same bytes)", "(torch.mm)"

# Largest error per mode, of the candidate and of the eager reference.
Checked = tuple[dict[Mode, float], dict[Mode, float]]


class Bench:
    """Measures an op on one device and appends its rows to the session's table."""

    def __init__(self, device: torch.device, quick: bool, rows: list[Row]) -> None:
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
        subject = _tolerance.Subject(op, size, dtype)
        outputs = _inputs.as_tuple(reference(**arguments))
        upstream = [torch.randn_like(output) for output in outputs]
        expected = harness.Expected.of(truth or reference, arguments, differentiable, upstream, modes)
        # an eager that is not the definition, such as a fused kernel of PyTorch's, rounds in its own way
        strict = ("ours",) if truth else OWN
        checked, status = self._verified(candidates, strict, expected, arguments, differentiable, subject)
        few = {candidate.name: candidate.rounds for candidate in candidates if candidate.rounds}
        added: list[Row] = []
        for mode in modes:
            calls: dict[str, Call] = {}
            failed = dict(status)
            for candidate in (c for c in candidates if c.function is not None and c.name in checked):
                if mode == "backward" and candidate.forward_only:
                    failed[candidate.name] = f"absent: {candidate.forward_only}"
                    continue
                try:
                    call = harness.prepare(candidate.function, arguments, differentiable, upstream, mode)
                    if candidate.name not in few:
                        call()
                except Exception as error:
                    if candidate.name in OWN:
                        raise
                    failed[candidate.name] = _failure(error)
                else:
                    calls[candidate.name] = call
            added += self._measure(subject, mode, calls, few, work, checked, failed)
        self.rows += added
        return added

    def _verified(
        self,
        candidates: Sequence[Candidate],
        strict: Sequence[str],
        expected: harness.Expected,
        arguments: dict[str, Any],
        differentiable: Sequence[str],
        subject: _tolerance.Subject,
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
                checked[candidate.name] = harness.verify(
                    candidate.function, wanted, arguments, differentiable, subject, slack
                )
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

    def _measure(
        self,
        subject: _tolerance.Subject,
        mode: Mode,
        calls: dict[str, Call],
        few: dict[str, int],
        work: Work,
        checked: dict[str, Checked],
        status: dict[str, str],
    ) -> list[Row]:
        short = str(subject.dtype).removeprefix("torch.")
        n_bytes, flops = work.of(mode)
        measured = {name: call for name, call in calls.items() if name not in few}
        memory = {name: harness.added_memory(call, self.device) / 2**20 for name, call in measured.items()}
        mm, mm_flops = harness.mm_call(subject.dtype, self.device, self.quick)
        limits = {COPY: harness.copy_call(n_bytes, self.device), MM: mm}
        times = harness.time_in_turns({**calls, **limits}, self.settings, self.device, few)
        device_times = self._device_times({**calls, **limits}, times)
        on_device = {name: device_times.get(name, sample.median()) for name, sample in times.items()}
        copy_rate, mm_rate = n_bytes / on_device[COPY], mm_flops / on_device[MM]
        eager, eager_device = times["eager"].median(), on_device["eager"]
        rows: list[Row] = []
        for name, sample in times.items():
            seconds = on_device[name]
            own = name not in limits
            errors, eager_errors = checked[name] if own else ({}, {})
            rows.append(
                Row(
                    subject.op, subject.case, short, mode, name, "ok",
                    median_us=sample.median() * 1e6,
                    low_us=sample.quantile(0.2) * 1e6,
                    high_us=sample.quantile(0.8) * 1e6,
                    device_us=device_times.get(name, math.nan) * 1e6,
                    against_eager=eager / sample.median() if own else math.nan,
                    device_against_eager=eager_device / seconds if own and name in device_times else math.nan,
                    share_of_copy=n_bytes / seconds / copy_rate if own else math.nan,
                    share_of_mm=flops / seconds / mm_rate if own and flops else math.nan,
                    added_mib=memory.get(name, math.nan),
                    error=errors.get(mode, math.nan),
                    eager_error=eager_errors.get(mode, math.nan),
                    rounds=len(sample.wall),
                    cpu_share=sum(sample.cpu) / sum(sample.wall) / torch.get_num_threads(),
                )
            )  # fmt: skip
        return rows + [Row(subject.op, subject.case, short, mode, name, text) for name, text in status.items()]

    def _device_times(self, calls: dict[str, Call], times: dict[str, Samples]) -> dict[str, float]:
        if self.device.type != "cuda":
            return {name: sample.processor() for name, sample in times.items()}
        replays = {name: harness.graphed(call) for name, call in calls.items()}
        replayed = harness.time_in_turns(
            {n: r for n, r in replays.items() if r is not None}, self.settings, self.device
        )
        return {name: sample.median() for name, sample in replayed.items()}


def verified_modes(rows: Sequence[Row]) -> set[str]:
    """The modes in which ours and eager were both verified against fp64 and took a positive time."""
    timed = {(row.candidate, row.mode) for row in rows if row.status == "ok" and row.median_us > 0}
    return {mode for name, mode in timed if name == "ours" and ("eager", mode) in timed}


def _failure(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
