"""From a compiled kernel and a launch to a *predicted* time. What it takes into account, and what not, is in
`docs/gpu_evidence.md`; nothing here was measured on a GPU.
"""

import dataclasses
import heapq
from collections.abc import Sequence

from astrobiogen.testing.speed.loops import OUTSIDE, Facts
from astrobiogen.testing.speed.machines import QUARTERS, Machine, resident

# Cycles from a load to its value with the memory busy, and of a barrier of the whole program: Luo et al. (arXiv
# 2402.13499) measure 470 to 480 cycles idle on sm_80 and sm_90.
MEMORY_LATENCY = 600
BARRIER = 30
# Calibrated, see `docs/gpu_evidence.md`: the part of the shorter of matrix and other work that the longer does not
# hide, and the share of the memory's peak that a stream reaches.
EXPOSED = 0.28
STREAM = 0.88


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch of a compiled kernel has to do.

    Attributes:
        size: benchmark size, for the table.
        trips: for each hot loop in code order the iterations of each program, in launch order. Hot are the innermost
            loops with matrix instructions or, if there is none, all innermost loops.
        around: iterations of the loop around a hot loop.
        step: multiply-adds of one of those iterations, where the compiler may have unrolled the loop; else 0.
        needed: multiply-adds of 16-bit operands on matrix units that the result needs.
        bytes: that the launch must move at least, each input read and each output written once.
        programs: in the grid.
    """

    size: str
    programs: int
    bytes: float
    trips: tuple[Sequence[int], ...] = ()
    around: int = 1
    needed: float = 0.0
    step: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled specialisation."""

    warps: int
    registers: int
    shared: int
    facts: tuple[Facts, ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A row of the tables; every figure is predicted from machine code, none is measured.

    Attributes:
        case: kernel specialisation. size: benchmark size. device: GPU.
        registers: per thread. shared: bytes per program. resident: programs per multiprocessor.
        matrix: matrix-unit cycles of the hot loops' bodies, summed, per warp. other: cycles of their busiest other
            pipe, or of issuing them.
        loads, stores: instructions on global memory in the hot loops' bodies.
        spills: local-memory instructions in loops.
        redundancy: matrix work done over needed; 0 for kernels without.
        makespan: average over longest load of the multiprocessors.
        bound: what the predicted time is made of: "matrix", "issue", "latency", "cache" or "memory".
        microseconds: predicted, without the launch. share: of the peak that bounds the operation, predicted.
    """

    case: str
    size: str
    device: str
    registers: int
    shared: int
    resident: int
    matrix: float
    other: float
    loads: int
    stores: int
    spills: int
    redundancy: float
    makespan: float
    bound: str
    microseconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class _Body:
    """Cycles of one pass through some code by all resident programs: their matrix units, the busiest other pipe, and
    what a program waits for beside them.
    """

    matrix: float
    other: float
    waiting: float

    def cycles(self, programs: int) -> float:
        busy = max(self.matrix, self.other) + EXPOSED * min(self.matrix, self.other)
        return max(busy, busy / programs + self.waiting)

    @property
    def bound(self) -> str:
        return "matrix" if self.matrix >= self.other else "issue"


def hot_loops(facts: Sequence[Facts]) -> list[Facts]:
    """Innermost loops with matrix instructions; all innermost loops where none has any."""
    parents = {one.parent for one in facts}
    innermost = [one for one in facts if one.loop != OUTSIDE and one.loop not in parents]
    return [one for one in innermost if one.mma or one.wgmma] or innermost


def predict(case: str, kernel: Kernel, work: Work, machine: Machine) -> Prediction:
    """Predicted time and share of peak of one launch.

    Raises:
        ValueError: the program does not fit, or the code has other loops or does less matrix work than `work` says.
    """
    label = f"{case}, {work.size}"
    held = resident(machine.arch, kernel.warps, kernel.registers, kernel.shared)
    if not held:
        raise ValueError(f"{label}: no program fits on a multiprocessor of sm_{machine.arch}")
    hot = hot_loops(kernel.facts)
    trips = _trips(kernel, hot, work)
    if len(trips) != len(hot) or any(len(one) != work.programs for one in trips):
        raise ValueError(f"{label}: the code has {len(hot)} hot loops, the description {len(trips)} or other programs")
    held = min(held, -(-work.programs // machine.multiprocessors))
    bodies = [_body(one, kernel.warps, held, machine) for one in hot]
    once = [one for one in kernel.facts if one.loop == OUTSIDE]
    fixed = sum(_body(one, kernel.warps, held, machine).cycles(held) for one in once)
    outer = {one.parent for one in hot} - {OUTSIDE}
    around = [one for one in kernel.facts if one.loop in outer]
    fixed += work.around * sum(_body(one, kernel.warps, held, machine).cycles(held) for one in around)
    each = [body.cycles(held) for body in bodies]
    loads = [fixed + sum(t[p] * c for t, c in zip(trips, each)) for p in range(work.programs)]
    longest, balance = makespan(loads, held * machine.multiprocessors)
    totals = [sum(one) for one in trips]
    done = kernel.warps * sum(n * (one.mma + one.wgmma) for n, one in zip(totals, hot))
    if done < work.needed * 0.999:
        raise ValueError(f"{label}: the code does {done:.4g} multiply-adds of {work.needed:.4g} needed")
    moved = kernel.warps * (
        sum(n * one.load_bytes for n, one in zip(totals, hot)) + work.programs * sum(one.load_bytes for one in once)
    )
    times = {
        _slowest(bodies, held, [n * c for n, c in zip(totals, each)]): longest / machine.sustained,
        "cache": moved / (machine.cache * machine.multiprocessors * machine.sustained),
        "memory": work.bytes / (machine.memory * STREAM),
    }
    bound = max(times, key=lambda name: times[name])
    floor = max(work.needed / machine.matrix_peak, work.bytes / machine.memory)
    return Prediction(
        case, work.size, machine.name, kernel.registers, kernel.shared, held,
        matrix=round(sum((_matrix(one, machine) for one in hot), 0.0), 1), other=float(sum(_other(one) for one in hot)),
        loads=sum(one.loads for one in hot), stores=sum(one.stores for one in hot),
        spills=sum(one.spills for one in kernel.facts if one.loop != OUTSIDE),
        redundancy=round(done / work.needed, 3) if work.needed else 0.0, makespan=round(balance, 3), bound=bound,
        microseconds=round(times[bound] * 1e6, 2), share=round(floor / times[bound], 3),
    )  # fmt: skip


def _trips(kernel: Kernel, hot: Sequence[Facts], work: Work) -> Sequence[Sequence[float]]:
    """Passes through each hot loop of the code, which may hold several iterations of the source's."""
    if not work.trips:
        return [[0.0] * work.programs] * len(hot)
    if not work.step:
        return work.trips
    unrolled = [max(1, round(kernel.warps * (one.mma + one.wgmma) / work.step)) for one in hot]
    return [[count / factor for count in counts] for counts, factor in zip(work.trips, unrolled)]


def makespan(loads: Sequence[float], slots: int) -> tuple[float, float]:
    """(longest, average over longest) load of `slots` that take the programs in order, each when it is free."""
    free = [0.0] * slots
    for load in loads:
        heapq.heapreplace(free, free[0] + load)
    longest = max(free)
    return longest, sum(loads) / slots / longest if longest else 1.0


def _body(one: Facts, warps: int, programs: int, machine: Machine) -> _Body:
    quarter = -(-warps * programs // QUARTERS)
    other = max(quarter * _other(one), warps * programs * one.shared)
    body = _Body(quarter * _matrix(one, machine), other, 0.0)
    waiting = float(BARRIER * one.barriers)
    if one.waits:  # what the program has to do between a load and the use of its result hides so much of the latency
        waiting += max(0.0, MEMORY_LATENCY - body.cycles(programs) * one.ahead / one.issued)
    return dataclasses.replace(body, waiting=waiting)


def _matrix(one: Facts, machine: Machine) -> float:
    return one.mma / machine.mma + (one.wgmma / machine.wgmma if one.wgmma else 0.0)


def _other(one: Facts) -> int:
    """Of one warp's quarter: a cycle per instruction, or more where one pipe is wanted more often."""
    return max(one.issued, one.multiply, one.alu, one.special)


def _slowest(bodies: Sequence[_Body], programs: int, weights: Sequence[float]) -> str:
    """What bounds the loop in which most time is spent; code without loops waits for its loads."""
    if not bodies or not any(weights):
        return "latency"
    _, body = max(zip(weights, bodies), key=lambda pair: pair[0])
    busy = dataclasses.replace(body, waiting=0.0).cycles(programs)
    return "latency" if body.waiting > busy / 2 and body.cycles(programs) > busy else body.bound
