"""Launches of attention over a graph's edges at its benchmark sizes; memory-bound."""

import math

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.edge_attention.samples import BENCHMARK_SIZES, Size
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF, SINGLE, INDEX = 2, 4, 8  # bytes
# Rows of nodes read once and written once, rows of edges (bias, weight, slope and its gradient) by their bytes.
NODE_ROWS = {"forward": 4, "backward_receiver": 5, "backward_sender": 4}
EDGE_BYTES = {"forward": HALF, "backward_receiver": 2 * HALF + 2 * SINGLE, "backward_sender": 2 * SINGLE}


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """One program per node."""
    del machine
    kind, shape, _ = case.name.split("/")
    return [_work(kind, size, case) for size in BENCHMARK_SIZES if f"{size.heads}x{size.width}" == shape]


def _work(kind: str, size: Size, case: CompileCase) -> Work:
    steps = [-(-edges // case.constexprs["EDGES"]) for edges in degrees(size.nodes, size.edges)]
    walks = 2 if kind == "backward_receiver" else 1
    moved = NODE_ROWS[kind] * size.nodes * size.heads * size.width * HALF
    moved += size.edges * (size.heads * EDGE_BYTES[kind] + 2 * INDEX) + size.nodes * (INDEX + SINGLE * size.heads)
    label = f"{size.nodes}x{size.edges}x{size.heads}x{size.width}"
    return Work(label, size.nodes, moved, (tuple(steps),) * walks)


def degrees(nodes: int, edges: int) -> list[int]:
    """Edges per node of a random graph, as the quantiles of a Poisson distribution: the same for every run."""
    mean = edges / nodes
    found: list[int] = []
    term, below, degree = math.exp(-mean), 0.0, 0
    while len(found) < nodes:
        below += term
        found += [degree] * (min(nodes, round(below * nodes)) - len(found))
        degree += 1
        term *= mean / degree
        if term < 1e-12:
            found += [degree] * (nodes - len(found))
    # Neighbours in the launch order have nothing to do with each other: a stride that shares no divisor mixes them.
    step = next(s for s in range(int(nodes * 0.618), nodes + 1) if math.gcd(s, nodes) == 1)
    return [found[index * step % nodes] for index in range(nodes)]
