"""How an operator is timed: candidates in turns, medians, and the machine's own limits measured in the same run.

* Every candidate's values and gradients are held against the fp64 reference before it is timed; a wrong peer is
  reported, not timed.
* Rounds go through all candidates one after the other, so that a slow spell of the machine hits all of them alike.
* CPU: wall time by `perf_counter`, and processor time of all threads together ("device"), which a busy machine
  disturbs far less. Memory that the kernel returns is warm: outputs are dropped at once and glibc
  keeps freed pages (see `keep_freed_pages`); otherwise page faults would dominate every large output.
* CPU, ops bound by memory: each candidate, and the copy, is timed on several sets of tensors at other addresses
  (`placement.py`).
* GPU: time between CUDA events of one call ("median"), and of one replay of a CUDA graph of that call ("device"),
  which leaves the host out. The L2 cache is overwritten before each call, and the host issues the call meanwhile.
* Limits: a `copy_` that moves the same number of bytes and a matrix product, timed in the same rounds.
"""

import ctypes
import dataclasses
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch

from astrobiogen.testing import inputs, tolerance
from benchmarks.placement import Placement

Mode = Literal["forward", "backward"]
Call = Callable[[], object]

# Larger than any L2 cache in the field (H200: 50 MB, B200: 126 MB).
L2_FLUSH_BYTES = 256 * 2**20
# Several times what the largest CPU benchmark holds at once.
WARM_HEAP_BYTES = 2**30
# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation: a function that takes the op's arguments by name, or the reason why it is absent."""

    name: str
    function: Callable[..., Any] | None
    absent: str = ""
    # Calls of seconds: at most so many timed rounds, no warm-up, memory not measured; 0: as the others.
    rounds: int = 0
    # Why its backward is left out, if it is.
    forward_only: str = ""
    # Times the allowed error: a peer that sums a long column in one fp32 chain, as compiled code does, is inexact, not
    # wrong.
    slack: float = 4.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must move and compute at least: bytes and floating-point operations, per mode."""

    forward_bytes: float
    backward_bytes: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0

    def of(self, mode: Mode) -> tuple[float, float]:
        """(bytes, flops) of a mode."""
        if mode == "forward":
            return self.forward_bytes, self.forward_flops
        return self.backward_bytes, self.backward_flops


@dataclasses.dataclass(frozen=True)
class Settings:
    """Repeats: at least `rounds` (or `least_rounds`, where these take four times `seconds` per candidate), then on
    until `seconds` per candidate are spent or `max_rounds` are done; on a CPU spread over `placements`.
    """

    rounds: int = 15
    least_rounds: int = 5
    max_rounds: int = 200
    seconds: float = 0.25
    warmup: int = 3
    # Untimed calls of a candidate right before each timed one.
    lead: int = 0
    placements: int = 5

    def part(self, parts: int) -> "Settings":
        """One of `parts` equal parts of the repeats."""
        counts = {name: math.ceil(getattr(self, name) / parts) for name in COUNTS}
        return dataclasses.replace(self, **counts, seconds=self.seconds / parts)


COUNTS = ("rounds", "least_rounds", "max_rounds", "warmup")
QUICK = Settings(rounds=4, least_rounds=4, max_rounds=6, seconds=0.05, warmup=1, placements=2)
ONCE = Settings(rounds=1, least_rounds=1, max_rounds=1, seconds=1e-3, warmup=0, placements=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a result table. Times in microseconds, over all placements; shares are of the same run's ceilings;
    `share_of_copy` is the median over placements, and `share_low` and `share_high` are its ends. NaN where not
    measured.
    """

    op: str
    size: str
    dtype: str
    mode: str
    candidate: str
    status: str
    median_us: float = float("nan")
    low_us: float = float("nan")
    high_us: float = float("nan")
    device_us: float = float("nan")
    against_eager: float = float("nan")
    device_against_eager: float = float("nan")
    share_of_copy: float = float("nan")
    share_of_mm: float = float("nan")
    added_mib: float = float("nan")
    error: float = float("nan")
    eager_error: float = float("nan")
    rounds: int = 0
    cpu_share: float = float("nan")
    share_low: float = float("nan")
    share_high: float = float("nan")
    placements: int = 0


def keep_freed_pages() -> bool:
    """Tell glibc to keep freed memory instead of unmapping it, and fault in enough of it for every candidate; False
    where there is no glibc. Without the second step a candidate that makes a large and a small output can push the
    heap's end up at every call, 8,704 page faults for 36 MB, and take six times as long.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    torch.empty(WARM_HEAP_BYTES, dtype=torch.uint8).fill_(1)  # `zeros` would leave fresh pages untouched
    return kept


def contention(seconds: float = 0.1) -> float:
    """Share of a core that a busy loop gets right now: 1.0 on an idle machine, 0.5 if it is shared by two."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        pass
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every candidate computes: `arguments` (tensors and plain values) by name, the names whose gradients the
    backward takes, and one upstream gradient per output.
    """

    arguments: dict[str, Any]
    differentiable: Sequence[str]
    upstream: Sequence[torch.Tensor]

    def moved(self, place: Placement) -> "Problem":
        """The same values at the addresses of `place`."""
        arguments = {name: place.moved(value) for name, value in self.arguments.items()}
        return Problem(arguments, self.differentiable, [place.moved(gradient) for gradient in self.upstream])


def prepare(function: Callable[..., Any], problem: Problem, mode: Mode) -> Call:
    """A call without arguments that runs one mode. Forward runs without recording a graph, as in inference; for
    "backward" the graph is built once and kept.
    """
    arguments = problem.arguments
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(**arguments)

        return forward
    leaves = {name: arguments[name].detach().requires_grad_(True) for name in problem.differentiable}
    results = inputs.as_tuple(function(**{**arguments, **leaves}))
    pairs = [(output, gradient) for output, gradient in zip(results, problem.upstream) if output.requires_grad]
    outputs, weights = [output for output, _ in pairs], [gradient for _, gradient in pairs]
    wanted = list(leaves.values())

    def backward() -> object:
        return torch.autograd.grad(outputs, wanted, weights, retain_graph=True, allow_unused=True)

    return backward


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the definition gives, in fp64 and in the problem's dtype: computed once and held against every candidate."""

    exact: inputs.Result
    plain: inputs.Result
    weights: Sequence[torch.Tensor]

    @classmethod
    def of(cls, definition: Callable[..., Any], problem: Problem, modes: Sequence[Mode]) -> "Expected":
        """Evaluate `definition`, with gradients if the backward is among `modes`."""
        weights = problem.upstream if "backward" in modes else []
        wide = [gradient.double() for gradient in weights]
        exact = inputs.evaluate(definition, inputs.upcast(problem.arguments), problem.differentiable, wide)
        plain = inputs.evaluate(definition, problem.arguments, problem.differentiable, weights)
        return cls(exact, plain, weights)

    def forward(self) -> "Expected":
        """The outputs alone."""
        exact, plain = (dataclasses.replace(result, gradients={}) for result in (self.exact, self.plain))
        return Expected(exact, plain, [])


def verify(
    candidate: Callable[..., Any],
    expected: Expected,
    problem: Problem,
    subject: tolerance.Subject,
    slack: float = 1.0,
) -> tuple[dict[Mode, float], dict[Mode, float]]:
    """Largest error per mode of `candidate` and of the same-dtype definition, against fp64.

    `slack` widens the rule for implementations whose rounding is not ours to choose: `slack` times the factor, and a
    floor of 8 (slack - 1) eps(fp32) times the largest value. Their errors stand in the table beside ours.

    Raises:
        AssertionError: beyond twice (gradients: three times) the definition's error plus the floor.
    """
    exact, eager = expected.exact, expected.plain
    got = inputs.evaluate(candidate, problem.arguments, problem.differentiable, expected.weights)
    errors: dict[Mode, float] = {"forward": 0.0, "backward": 0.0}
    eager_errors: dict[Mode, float] = {"forward": 0.0, "backward": 0.0}
    checks: list[tuple[Mode, str, Any, Any, Any, float]] = [
        ("forward", f"output {i}", *triple, tolerance.FORWARD_FACTOR)
        for i, triple in enumerate(zip(got.outputs, eager.outputs, exact.outputs))
    ]
    checks += [
        (
            "backward",
            f"gradient of {n}",
            got.gradients[n],
            eager.gradients[n],
            exact.gradients[n],
            tolerance.GRADIENT_FACTOR,
        )
        for n in got.gradients
    ]
    for mode, quantity, value, plain, truth, factor in checks:
        size = truth.abs().max().item() if truth is not None and truth.numel() else 0.0
        floor = 8 * (slack - 1) * torch.finfo(torch.float32).eps * size
        measured = tolerance.compare(
            subject, quantity, value, plain, truth, factor=slack * factor, absolute_floor=floor
        )
        errors[mode] = max(errors[mode], measured.error)
        eager_errors[mode] = max(eager_errors[mode], measured.eager_error)
    return errors, eager_errors


@dataclasses.dataclass
class Samples:
    """Seconds per round of one call: wall and processor time."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def extend(self, other: "Samples") -> None:
        """Take in the rounds of another placement."""
        self.wall += other.wall
        self.cpu += other.cpu

    def median(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.wall)

    def processor(self) -> float:
        """Median processor time in seconds, all threads together."""
        return statistics.median(self.cpu)

    def quantile(self, share: float) -> float:
        """Quantile of the wall time in seconds."""
        ordered = sorted(self.wall)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def time_in_turns(
    calls: dict[str, Call], settings: Settings, device: torch.device, limits: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Samples]:
    """Run all calls round after round; see the module's text for what is timed.

    `limits`: at most so many rounds for some of them, which are not warmed up either.
    """
    measure = _time_cuda if device.type == "cuda" else _time_cpu
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for name, call in calls.items():
        for _ in range(0 if name in limits else settings.warmup):
            call()
    found = {name: Samples() for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for done in range(settings.max_rounds):
            spent = (time.perf_counter() - started) / (settings.seconds * len(calls))
            if (done >= settings.rounds and spent > 1.0) or (done >= settings.least_rounds and spent > 4.0):
                break
            for name, call in calls.items():
                if done >= limits.get(name, settings.max_rounds):
                    continue
                for _ in range(settings.lead):
                    call()
                wall, cpu = measure(call, flush)
                found[name].wall.append(wall)
                found[name].cpu.append(cpu)
    finally:
        if collecting:
            gc.enable()
    return found


def added_memory(call: Call, device: torch.device) -> float:
    """Most bytes that one call held at once, over what was there before; its results are part of it.

    CPU: PyTorch's allocations (profiler events); scratch that a C++ kernel takes from malloc is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        held = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del held
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return float(peak)


def copy_call(n_bytes: float, device: torch.device, place: Placement | None) -> Call:
    """A `copy_` that reads and writes `n_bytes` together, with a warm destination, at the addresses of `place`."""
    source = torch.ones(max(int(n_bytes / 2), 4) // 4, dtype=torch.float32, device=device)
    destination = torch.empty_like(source)
    if place is not None:
        source, destination = place.moved(source), place.moved(destination)
    return lambda: destination.copy_(source)


def mm_call(dtype: torch.dtype, device: torch.device, quick: bool) -> tuple[Call, float]:
    """A square matrix product and its floating-point operations; fp32 on the CPU, where halves have no fast path."""
    size = 4096 if device.type == "cuda" else (256 if quick else 512)
    kind = dtype if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=kind)
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3


def _time_cpu(call: Call, flush: torch.Tensor | None) -> tuple[float, float]:
    del flush
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu


def _time_cuda(call: Call, flush: torch.Tensor | None) -> tuple[float, float]:
    assert flush is not None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # still under way when the call is issued: what issuing takes stands in no short kernel's time
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, float("nan")
