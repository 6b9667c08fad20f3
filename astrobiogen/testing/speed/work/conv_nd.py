"""Launches of the convolution at its benchmark sizes: forward, adjoint and weight gradient, in bf16 and TF32."""

import itertools
import math
from collections.abc import Sequence

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.conv_nd.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.conv_nd.triton.launch import Problem, adjoint_problem, weight_launch
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

# Bytes per element, and how many 16-bit products one product costs.
DTYPES = {"bf16": (2, 1), "fp32 as tf32": (4, 2)}
SINGLE = 4


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """The norms' own kernels and exact fp32, which no matrix unit multiplies, are left out."""
    del machine
    kind, name, *rest = case.name.split("/")
    sizes = [size for size in BENCHMARK_SIZES if size.name == name]
    if not sizes or not rest or rest[0] not in DTYPES:
        return []
    (size,), (width, cost) = sizes, DTYPES[rest[0]]
    shape = (1, size.spatial, size.spatial, size.kernel, size.geometry())
    if kind == "adjoint":
        problem = adjoint_problem(*shape, (size.outputs, size.channels))
    else:
        problem = Problem.of(*shape, (size.channels, size.outputs))
    positions = math.prod(size.spatial)
    needed = float(cost * math.prod(sum(map(len, axis)) for axis in _taps(problem)) * size.channels * size.outputs)
    blocks = (case.constexprs[f"BLOCK_{axis}"] for axis in "MNK")
    step = float(cost * math.prod(blocks))
    weights = problem.taps * size.channels * size.outputs
    if kind == "weight":
        launch = weight_launch(problem, width, case.targets[0], precision=case.constexprs["PRECISION"])
        trips = _weight_trips(problem, case, launch.grid // launch.splits, launch.splits)
        moved = width * positions * (size.channels + size.outputs) + SINGLE * launch.splits * weights
        planes = -(-problem.planes // launch.splits)
        return [Work(_label(size), launch.grid, moved, (trips,), planes, needed, step)]
    trips = _forward_trips(problem, case)
    kept = 2 if case.constexprs["KEEP"] else 1
    moved = width * (positions * (problem.source_channels + kept * problem.target_channels) + weights)
    around = problem.axes[0][0] * problem.axes[1][0] * (1 if problem.packed else problem.axes[2][0])
    return [Work(_label(size), len(trips), moved, (trips,), around, needed, step)]


def _label(size: Size) -> str:
    return f"{size.channels}->{size.outputs} {'x'.join(map(str, size.spatial))} by {'x'.join(map(str, size.kernel))}"


def _taps(problem: Problem) -> list[list[list[int]]]:
    """For each axis and output position the taps that meet the input; stride 1, as in every benchmark size."""
    found = []
    for (kernel, _, padding, dilation, mode), size in zip(problem.axes, problem.source):
        inside = [[t for t in range(kernel) if mode or 0 <= q - padding + t * dilation < size] for q in range(size)]
        found.append(inside)
    return found


def _forward_trips(problem: Problem, case: CompileCase) -> Sequence[int]:
    """Steps over K of each program: of the taps that meet the input on the axes that the kernel loops over."""
    constants, taps = case.constexprs, _taps(problem)
    inner = math.prod(axis[0] for axis in problem.axes[2 if problem.packed else 3 :])
    if problem.packed:
        steps = -(-inner * problem.source_channels // constants["BLOCK_K"])
    else:
        steps = inner * -(-problem.source_channels // constants["BLOCK_K"])
    tiles = -(-problem.plane // constants["BLOCK_M"]) * -(-problem.target_channels // constants["BLOCK_N"])
    trips: list[int] = []
    for outer in itertools.product(*taps[:3]):
        looped = outer[:2] if problem.packed else outer
        trips += [steps * math.prod(map(len, looped))] * tiles
    return trips


def _weight_trips(problem: Problem, case: CompileCase, tiles: int, splits: int) -> Sequence[int]:
    """Steps over the positions of each program: of the planes of its split that its tap meets."""
    constants, taps = case.constexprs, _taps(problem)
    steps = -(-problem.plane // constants["BLOCK_K"])
    looped = 2 if problem.packed else 3
    outer = list(itertools.product(*(range(axis[0]) for axis in problem.axes[:looped])))
    per_tap = tiles // len(outer)
    planes = list(itertools.product(*taps[:3]))
    share = -(-len(planes) // splits)
    trips: list[int] = []
    for split in range(splits):
        mine = planes[split * share : (split + 1) * share]
        for tap in outer:
            met = sum(all(t in axis for t, axis in zip(tap, plane)) for plane in mine)
            trips += [steps * met] * per_tap
    return trips
