"""Launches of causal attention at its benchmark sizes: the tiles that each program visits, and the products that the
visible pairs of query and key need.
"""

from collections.abc import Sequence

from astrobiogen.kernels.attention.samples import BENCHMARK_SIZES, GPU_BENCHMARK_SIZES, Size
from astrobiogen.kernels.cases import CompileCase
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work

HALF, SINGLE = 2, 4  # bytes
# Products of [rows, D] matrices per visible pair of query and key.
PRODUCTS = {"forward": 2, "grad_query": 3, "grad_key": 4}


def works(case: CompileCase, machine: Machine) -> list[Work]:
    """Forward, dQ and dK with dV, causal, without windows, packing, soft caps or sinks."""
    del machine
    kind, dim, _, *options = case.name.split("/")
    if kind not in PRODUCTS or options:
        return []
    sizes = [s for s in (*BENCHMARK_SIZES, *GPU_BENCHMARK_SIZES) if s.dim == int(dim) and s.queries is None]
    return [_work(kind, size, case) for size in sizes]


def _work(kind: str, size: Size, case: CompileCase) -> Work:
    block_m, block_n = case.constexprs["BLOCK_M"], case.constexprs["BLOCK_N"]
    pairs = size.batch * size.heads * size.tokens * (size.tokens + 1) // 2
    group = size.heads // size.kv_heads
    rows, keys = (size.batch * n * size.tokens * size.dim * HALF for n in (size.heads, size.kv_heads))
    label = f"{size.batch}x{size.tokens}x{size.heads}:{size.kv_heads}x{size.dim}"
    needed = float(PRODUCTS[kind] * pairs * size.dim)
    if kind == "grad_key":
        tiles = _query_tiles(size.tokens, block_m, block_n)
        programs = size.batch * size.kv_heads
        both = tuple([group * count for count in part for _ in range(programs)] for part in tiles)
        trips = (tuple(sum(parts) for parts in zip(*both)),) if case.constexprs["ONE_LOOP"] else both
        moved = 2 * rows + 4 * keys + 2 * SINGLE * size.batch * size.heads * size.tokens
        return Work(label, len(trips[0]), moved, trips, around=group, needed=needed)
    programs = size.batch * size.heads
    order = -1 if kind == "forward" else 1  # forward starts with the longest block
    parts = _key_tiles(size.tokens, block_m, block_n)
    trips = tuple([count for count in part[::order] for _ in range(programs)] for part in parts)
    moved = (2 if kind == "forward" else 3) * rows + 2 * keys + SINGLE * size.batch * size.heads * size.tokens
    return Work(label, len(trips[0]), moved, trips, needed=needed)


def _key_tiles(tokens: int, block_m: int, block_n: int) -> tuple[Sequence[int], Sequence[int]]:
    """For each block of queries the key tiles that it sees whole and those that its diagonal or the last key cuts."""
    clean, edge = [], []
    for first in range(0, tokens, block_m):
        last = min(first + block_m, tokens)
        whole = (first + 1) // block_n
        clean.append(whole)
        edge.append(-(-last // block_n) - whole)
    return clean, edge


def _query_tiles(tokens: int, block_m: int, block_n: int) -> tuple[Sequence[int], Sequence[int]]:
    """For each block of keys the query tiles that its diagonal cuts and those that see it whole."""
    masked, clean = [], []
    for first in range(0, tokens, block_n):
        begin, last = first // block_m, min(first + block_n, tokens) - 1
        whole = min(-(-last // block_m), -(-tokens // block_m))
        masked.append(whole - begin)
        clean.append(-(-tokens // block_m) - whole)
    return masked, clean
