"""Tile sizes per architecture, and how a head dimension is cut. Every figure here was read from compiled code; see
README.md.
"""

import dataclasses

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile: `block_m` queries, `block_n` keys, warps per program and pipeline stages.

    `one_loop`: every tile of dK, dV is masked, in one loop, instead of masked and clean tiles in loops of their own:
    fewer registers for about 15 % more instructions.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    one_loop: bool = False


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels that carry the work."""

    forward: Tile
    grad_query: Tile
    grad_key: Tile


PACK_ROWS = 32
PACK_WARPS = 4
CONSTANT_ROWS = 128  # no kernel reads row constants in larger blocks, so padding to it needs no mask
CONSTANT_WARPS = 4
# Up to this many query tokens the heads of a group share a program's rows, and the keys are split over programs.
FEW_QUERIES = 16
SPLIT_CHUNK = 256  # fewest keys per program: below, the combination costs more than the chunk
SPLIT_PROGRAMS_PER_SM = 2

# Under the interpreter: small, so that tiny inputs have several tiles, edges and clean ones.
INTERPRETED = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))

# (widest MAIN + TAIL, tiles), the first that fits serves. sm_80 has 163 KB of shared memory per block, sm_86 and
# sm_89 99 KB, sm_90 227 KB. Three stages are two buffers: with two stages the next tile is fetched only after this one
# is used up.
_AMPERE = (
    (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3, True))),
    (96, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3, True))),
    (128, Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 3, True))),
    (256, Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))),
)
_HOPPER = (
    (96, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3))),
    (128, Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 3, True))),
    (256, Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 1))),
)
TILES = {80: _AMPERE, 86: _AMPERE, 89: _AMPERE, 90: _HOPPER}
# Few queries: 16 rows, the smallest number of rows of a dot.
FEW_TILES = ((96, Tile(16, 64, 4, 3)), (128, Tile(16, 32, 4, 3)), (256, Tile(16, 32, 4, 2)))
FP32_FEW = Tile(16, 16, 4, 1)
# fp32 input: twice the bytes per element and no tensor cores (full precision is asked for).
FP32_TILES = (
    (128, Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
    (256, Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))),
)


def cut_head(dim: int) -> tuple[int, int]:
    """(MAIN, TAIL): a power of two and a smaller one (or 0) that together hold `dim` columns; MAIN at least 32 and TAIL
    at least 16, since a dot needs 16 columns and MAIN is taken in two halves.

    68 -> 64 + 16, 80 -> 64 + 16, 96 -> 64 + 32, 100 -> 128 (64 + 64 would be no narrower), 160 -> 128 + 32.
    """
    whole = max(32, triton.next_power_of_2(dim))
    main = whole // 2
    if dim >= whole or main < 32:
        return whole, 0
    tail = max(16, triton.next_power_of_2(dim - main))
    return (whole, 0) if main + tail == whole else (main, tail)


def tiles(capability: int, width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for one architecture (major * 10 + minor; 0 under the interpreter), head width and dtype."""
    if capability == 0:
        return INTERPRETED
    table = FP32_TILES if dtype == torch.float32 else TILES[max((c for c in TILES if c <= capability), default=86)]
    return next(entry for widest, entry in table if width <= widest)


def few_tile(capability: int, width: int, dtype: torch.dtype) -> Tile:
    """The tile for few queries, where the heads of a group share the rows."""
    if capability == 0:
        return INTERPRETED.forward
    return FP32_FEW if dtype == torch.float32 else next(tile for widest, tile in FEW_TILES if width <= widest)
