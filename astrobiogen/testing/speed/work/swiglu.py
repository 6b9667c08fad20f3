"""Launches of SwiGLU at its benchmark sizes; memory-bound."""

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.swiglu.samples import BENCHMARK_SIZES
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF = 2  # bytes
TENSORS = {"forward": 3, "backward": 5, "backward_product": 6}


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """Forward reads gate and up and writes the product; backward reads a gradient more and writes two."""
    del machine
    kind, *packed, columns, _ = case.name.split("/")
    tile = case.constexprs["TILE"]
    found = []
    for size in BENCHMARK_SIZES:
        if size.columns == int(columns):
            rows, width = (size.rows, size.columns) if packed else (1, size.rows * size.columns)
            programs = rows * -(-width // tile)
            found.append(Work(f"{size.rows}x{size.columns}", programs, TENSORS[kind] * HALF * size.rows * size.columns))
    return found
