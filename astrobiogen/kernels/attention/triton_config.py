"""Tile sizes per architecture, and how a head dimension is cut. Every figure here was read from compiled code; see
README.md.
"""

import dataclasses

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile: `block_m` queries, `block_n` keys, warps per program and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels that carry the work."""

    forward: Tile
    grad_query: Tile
    grad_key: Tile


PACK_ROWS = 32
PACK_WARPS = 4
DELTA_ROWS = 32
DECODE_HEADS = 16  # the smallest number of rows of a tensor-core dot
DECODE_TILE = Tile(DECODE_HEADS, 32, 2, 2)  # 64 keys with 4 warps spill at 68 columns on sm_86
DECODE_CHUNK = 256  # fewest keys per program: below, the combination costs more than the chunk
DECODE_PROGRAMS_PER_SM = 2

# Under the interpreter: small, so that tiny inputs have several tiles, edges and clean ones.
INTERPRETED = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))

# (widest MAIN + TAIL, tiles), the first that fits serves. sm_80 has 163 KB of shared memory per block, sm_86 and
# sm_89 99 KB, sm_90 227 KB.
# Triton lays the warps of chained dots along the rows, 16 rows each: 8 warps on 64 rows repeat part of the work (1.5x
# the products in dK, dV). That is still taken at 128 columns, where 128 rows spill. 32 queries in dK, dV spill from 68
# columns on (15 spill instructions with all masks on sm_86), 16 do not.
_SMALL_SHARED = (
    (64, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 128, 8, 1))),
    (96, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(16, 128, 8, 1))),
    (128, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 1))),
    (256, Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))),
)
_LARGE_SHARED = (
    (64, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 128, 8, 1))),
    (96, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(16, 128, 8, 1))),
    (128, Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 1))),
    (256, Tiles(Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1))),
)
# wgmma keeps its operands in shared memory, so sm_90 has registers for wider tiles.
_HOPPER = (
    (96, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(16, 128, 8, 1))),
    *_LARGE_SHARED[2:],
)
TILES = {80: _LARGE_SHARED, 86: _SMALL_SHARED, 89: _SMALL_SHARED, 90: _HOPPER}
# fp32 input: twice the bytes per element and no tensor cores (full precision is asked for).
FP32_TILES = (
    (128, Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
    (256, Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))),
)


def cut_head(dim: int) -> tuple[int, int]:
    """(MAIN, TAIL): a power of two and a smaller one (or 0) that together hold `dim` columns; both at least 16, as a
    dot needs.

    68 -> 64 + 16, 80 -> 64 + 16, 96 -> 64 + 32, 100 -> 128 (64 + 64 would be no narrower), 160 -> 128 + 32.
    """
    whole = max(16, triton.next_power_of_2(dim))
    main = whole // 2
    if dim >= whole or main < 16:
        return whole, 0
    tail = max(16, triton.next_power_of_2(dim - main))
    return (whole, 0) if main + tail == whole else (main, tail)


def tiles(capability: int, width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for one architecture (major * 10 + minor; 0 under the interpreter), head width and dtype."""
    if capability == 0:
        return INTERPRETED
    table = FP32_TILES if dtype == torch.float32 else TILES[max((c for c in TILES if c <= capability), default=86)]
    return next(entry for widest, entry in table if width <= widest)


def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; 0 for a CPU tensor (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 under the interpreter, so that the decode kernel splits there
    too.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
