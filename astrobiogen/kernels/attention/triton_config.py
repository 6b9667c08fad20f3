"""Tile sizes per architecture, and how a head dimension is cut. Every figure here was read from compiled code; see
README.md.
"""

import dataclasses

import torch
import triton

from astrobiogen.kernels.devices import CAPABILITIES


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
    """Tiles of the three kernels that carry the work; `grad_key_masked` serves windows, packed sequences and soft caps,
    whose masks and derivative take the registers of half a tile.
    """

    forward: Tile
    grad_query: Tile
    grad_key: Tile
    grad_key_masked: Tile


PACK_ROWS = 32
PACK_WARPS = 4
CONSTANT_ROWS = 128  # no kernel reads row constants in larger blocks, so padding to it needs no mask
CONSTANT_WARPS = 8  # with four, the rows of out, of its rest and of its gradient spilled
# Up to this many query tokens the heads of a group share a program's rows, and the keys are split over programs.
FEW_QUERIES = 16
SPLIT_CHUNK = 256  # fewest keys per program: below, the combination costs more than the chunk
SPLIT_PROGRAMS_PER_SM = 2

# Under the interpreter: small, so that tiny inputs have several tiles, edges and clean ones.
INTERPRETED = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1, one_loop=True))

# (widest MAIN + TAIL, tiles), the first that fits serves. Shared memory per block: sm_80 163 KB, sm_86 and sm_89 99 KB,
# sm_90 227 KB.
# * Three stages are two buffers: with two, the next tile is fetched only when this one is used up.
# * Forward and dQ take 128 query rows, 16 per warp: the keys that a program reads from L2 serve twice as many products
#   as with 64 (at 68 columns 0.9 instead of 1.7 TB/s on an RTX A5000 at full rate, arithmetic).
# * dK and dV hold two accumulators of [keys, D] in registers: 64 keys and 4 warps (two programs per multiprocessor) or
#   128 keys and 8 warps. 8 warps on 64 rows repeat half of the products; they serve where nothing else stays in the
#   registers.
_SM80 = (
    (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3, True), Tile(32, 64, 8, 3, True))),
    (96, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(16, 64, 8, 3, True), Tile(16, 64, 8, 3, True))),
    (128, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3, True), Tile(32, 64, 8, 3, True))),
    (160, Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(16, 32, 8, 2, True), Tile(16, 64, 8, 2, True))),
    (256, Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2, True), Tile(32, 32, 8, 2, True))),
)
_SM86 = (
    (64, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3, True), Tile(32, 64, 8, 3, True))),
    (80, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(16, 64, 8, 3, True), Tile(16, 64, 8, 3, True))),
    (96, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(16, 32, 8, 3, True), Tile(16, 64, 8, 3, True))),
    (128, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3, True), Tile(32, 64, 8, 3, True))),
    (160, Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(16, 32, 8, 2, True), Tile(16, 32, 8, 2, True))),
    (256, Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2, True), Tile(32, 32, 8, 2, True))),
)
# wgmma keeps its second operand in shared memory, so sm_90 has registers for wider tiles.
_SM90 = (
    (80, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 8, 3, True), Tile(32, 128, 8, 3, True))),
    (96, Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3, True), Tile(32, 128, 8, 3, True))),
    (128, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3, True), Tile(32, 64, 8, 3, True))),
    (160, Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2, True), Tile(16, 64, 8, 2, True))),
    (256, Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2, True), Tile(32, 32, 8, 2, True))),
)
TILES = {80: _SM80, 86: _SM86, 90: _SM90}
# Few queries, bound by the memory of the keys: 16 rows are the fewest of a dot, and two warps share one tile.
FEW_TILE = Tile(16, 32, 2, 3)
# fp32 input: twice the bytes per element and no tensor cores (full precision is asked for).
FP32_TILES = (
    (128, Tiles(*(Tile(32, 32, 4, 1),) * 4)),
    (256, Tiles(Tile(32, 16, 4, 1), *(Tile(16, 16, 4, 1),) * 3)),
)
FP32_FEW_TILE = Tile(16, 16, 4, 1)


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
    table = FP32_TILES if dtype == torch.float32 else TILES[CAPABILITIES[capability]]
    return next(entry for widest, entry in table if width <= widest)


def few_tile(capability: int, dtype: torch.dtype) -> Tile:
    """The tile for few queries, where the heads of a group share the rows."""
    if capability == 0:
        return INTERPRETED.forward
    return FP32_FEW_TILE if dtype == torch.float32 else FEW_TILE
