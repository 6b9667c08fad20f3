"""Launches of the fused loss's own kernels at its benchmark sizes; memory-bound. The matrix products are cuBLAS's."""

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.linear_cross_entropy.samples import BENCHMARK_SIZES, GPU_BENCHMARK_SIZES, Size
from astrobiogen.kernels.linear_cross_entropy.triton_kernels import slab_columns
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF, SINGLE = 2, 4  # bytes


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """One slab of the vocabulary, all tokens: the statistics read it, the slope reads and writes it."""
    del machine
    if "softcap" in case.name:
        return []
    return [_work(case, size) for size in (*BENCHMARK_SIZES, *GPU_BENCHMARK_SIZES)]


def _work(case: CompileCase, size: Size) -> Work:
    columns = slab_columns(size.tokens, size.vocabulary)
    blocks = -(-columns // case.constexprs["BLOCK"])
    label = f"{size.tokens}x{size.hidden}x{size.vocabulary}"
    slab = HALF * size.tokens * columns
    if case.name.startswith("slope"):
        return Work(label, size.tokens * blocks, 2 * slab + 3 * SINGLE * size.tokens)
    return Work(label, size.tokens, slab + 10 * SINGLE * size.tokens, ((blocks,) * size.tokens,))
