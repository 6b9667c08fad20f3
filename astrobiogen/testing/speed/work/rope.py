"""Launches of RoPE at its benchmark sizes; memory-bound."""

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.rope.samples import BENCHMARK_SIZES
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF, SINGLE = 2, 4  # bytes


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """x is read and written once, the tables of cosines and sines are read once."""
    del machine
    constants, shape = case.constexprs, case.name.split("/")[-2]
    found = []
    for size in BENCHMARK_SIZES:
        label = f"{size.length}x{size.heads}x{size.width}r{size.rotary}"
        if label == shape:
            programs = -(-size.length // constants["TOKENS"]) * -(-size.heads // constants["HEADS"])
            tables = size.length * size.rotary * SINGLE
            found.append(Work(label, programs, 2 * HALF * size.length * size.heads * size.width + tables))
    return found
