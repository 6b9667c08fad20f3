"""From a convolution's sizes to one kernel launch: which kernel, tile sizes, grid. Pure arithmetic, so that the
compile gate asks the same code.

The tile sizes come from shared memory and register counts, not from timings: no GPU was at hand when they were chosen.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from astrobiogen.kernels.conv_nd.geometry import GROUP, INNER_AXES, MAX_AXES, Geometry
from astrobiogen.kernels.conv_nd.triton.forward import conv_packed, conv_taps
from astrobiogen.kernels.conv_nd.triton.weight import weight_packed, weight_taps
from astrobiogen.kernels.triton_launch import launch

# Below this many input channels per group a K step per tap would be mostly padding (tensor cores take K = 16 of half
# precision).
PACKED_CHANNELS = 16
# Partials of the weight gradient: enough programs for a few waves on the largest device (132 multiprocessors), at
# most this much memory.
WEIGHT_PROGRAMS = 1024
PARTIAL_BYTES = 32 * 2**20
INT32_ELEMENTS = 2**31


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of one family of kernels: block sizes, warps and pipeline depth."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Half precision: the sums take half of the registers that eight warps leave a thread, and three stages half of the
# shared memory of sm_86 and sm_89.
SMALL_SHARED = {"taps": Tile(128, 128, 32, 8, 3), "packed": Tile(64, 128, 64, 8, 2), "weight": Tile(128, 128, 32, 8, 3)}
# sm_80 (164 KiB) and sm_90 (228 KiB): K = 64 halves the barriers; 96 KiB.
LARGE_SHARED = {"taps": Tile(128, 128, 64, 8, 3), "packed": Tile(64, 128, 64, 8, 2), "weight": Tile(128, 128, 64, 8, 3)}
# fp32 operands (tf32 or ieee): twice the bytes and, for ieee, no tensor cores: smaller tiles. Fewer warps, larger tiles
# and more stages spilled (the op's notes).
SINGLE = {"taps": Tile(64, 64, 32, 8, 3), "packed": Tile(64, 32, 32, 4, 2), "weight": Tile(64, 64, 32, 4, 2)}
# Up to this many outputs per group 128 positions share one narrow block of sums, and the loads of x take the registers:
# ptxas spilled 6 (128 x 16 x 32, sm_86) and 11 (64 x 16 x 64, sm_80). 64 x 16 x 32: 98 registers, no spill.
NARROW_OUTPUTS, NARROW_M, NARROW_K = 16, 64, 32
# A group norm's per-channel sums beside 128 x 128 x 64 spilled 22 registers on sm_80; K = 32 takes 226.
GROUP_K, GROUP_STAGES = 32, 4
LARGE_SHARED_TARGETS = (80, 90)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution (or its adjoint) in five axes: what is read, what is written, and each axis' (kernel, stride,
    padding, dilation, mode)."""

    batch: int
    source: tuple[int, ...]
    target: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    source_channels: int
    target_channels: int
    groups: int
    transposed: bool

    @classmethod
    def of(
        cls,
        batch: int,
        source: Sequence[int],
        target: Sequence[int],
        kernel: Sequence[int],
        geometry: Geometry,
        channels: tuple[int, int],
        transposed: bool = False,
    ) -> "Problem":
        """`channels`: read and written channels per group."""
        missing = MAX_AXES - len(kernel)
        for name, size in (("input", source), ("output", target)):
            if math.prod(size[-INNER_AXES:]) >= INT32_ELEMENTS:
                raise ValueError(
                    f"the last three axes of a convolution's {name} may hold at most {INT32_ELEMENTS - 1} positions on "
                    f"CUDA, got {tuple(size[-INNER_AXES:])}"
                )
        rows = zip(kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.mode)
        return cls(
            batch,
            (1,) * missing + tuple(source),
            (1,) * missing + tuple(target),
            ((1, 1, 0, 1, 0),) * missing + tuple(tuple(row) for row in rows),
            *channels,
            geometry.groups,
            transposed,
        )

    @property
    def planes(self) -> int:
        """Outer positions of the target: batch times its first three axes."""
        return self.batch * self.target[0] * self.target[1] * self.target[2]

    @property
    def plane(self) -> int:
        """Positions of one target plane."""
        return self.target[3] * self.target[4]

    @property
    def taps(self) -> int:
        """Size of the kernel."""
        total = 1
        for axis in self.axes:
            total *= axis[0]
        return total

    @property
    def packed(self) -> bool:
        """True where taps and channels share the K axis."""
        return self.source_channels < PACKED_CHANNELS

    def integers(self) -> dict[str, int]:
        """The sizes that a kernel takes at run time."""
        names = ("D1", "D2", "D3", "H", "W", "N1", "N2", "N3", "NH", "NW")
        return dict(zip(names, (*self.source, *self.target)))

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments that forward and weight kernels share."""
        widest = max(
            self.source[3]
            * self.source[4]
            * self.source_channels
            * self.groups
            * (self.source[2] if self.packed else 1),
            self.plane * self.target_channels * self.groups,
        )
        named = {f"AXIS{number + 1}": axis for number, axis in enumerate(self.axes)}
        sizes = {"KG": self.source_channels, "NG": self.target_channels, "GROUPS": self.groups}
        return {**sizes, **named, "WIDE": widest >= INT32_ELEMENTS}


def adjoint_problem(
    batch: int,
    source: Sequence[int],
    target: Sequence[int],
    kernel: Sequence[int],
    geometry: Geometry,
    channels: tuple[int, int],
) -> Problem:
    """The adjoint of a convolution. With stride 1 it is a convolution with the taps in reverse order and padding d(K
    - 1) - p; else `transposed`."""
    if any(step != 1 for step in geometry.stride):
        return Problem.of(batch, source, target, kernel, geometry, channels, transposed=True)
    rows = zip(geometry.dilation, kernel, geometry.padding)
    mirrored = dataclasses.replace(geometry, padding=tuple(d * (k - 1) - p for d, k, p in rows))
    return Problem.of(batch, source, target, kernel, mirrored, channels)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch without its tensors; `splits`: partial results that its programs leave."""

    kernel: Any
    grid: int
    integers: dict[str, int]
    constants: dict[str, Any]
    warps: int
    stages: int
    splits: int = 1

    def __call__(self, **tensors: Any) -> None:
        """Run on `tensors`."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        launch(self.kernel, (self.grid,))(**tensors, **self.integers, **self.constants, **options)


def tile_for(family: str, itemsize: int, target: int) -> Tile:
    """The tile of a kernel family ("taps", "packed", "weight") for an element size and a compute capability such as
    86."""
    if itemsize == 4:
        return SINGLE[family]
    return (LARGE_SHARED if target in LARGE_SHARED_TARGETS else SMALL_SHARED)[family]


def forward_tile(problem: Problem, itemsize: int, target: int, norm: int = 0) -> Tile:
    """The tile of `forward_launch`, before it is cut to the problem's sizes."""
    if problem.packed:
        return tile_for("packed", itemsize, target)
    tile = tile_for("taps", itemsize, target)
    if problem.target_channels <= NARROW_OUTPUTS:
        tile = dataclasses.replace(tile, m=min(tile.m, NARROW_M), k=min(tile.k, NARROW_K))
    if norm == GROUP and tile.k > GROUP_K:
        tile = dataclasses.replace(tile, k=GROUP_K, stages=GROUP_STAGES)
    return tile


def holds_all_channels(problem: Problem, itemsize: int, target: int) -> bool:
    """True where one tile holds all output channels of its positions, so that the epilogue can normalise them."""
    return problem.groups == 1 and problem.target_channels <= forward_tile(problem, itemsize, target).n


def position_tile(problem: Problem, itemsize: int, target: int) -> int:
    """Positions of one (last two axes) plane that a program of `forward_launch` computes."""
    return _fit(forward_tile(problem, itemsize, target).m, problem.plane)


def forward_launch(
    problem: Problem,
    itemsize: int,
    target: int,
    *,
    precision: str,
    activation: int = 0,
    keep: bool = False,
    norm: int = 0,
) -> Launch:
    """The launch of a convolution or its adjoint. `norm` (index into `NORMS`): a channel norm needs
    `holds_all_channels`; a group norm leaves partial statistics per tile. The bias is always read, zeros if there is
    none: without that addition ptxas (Triton 3.7) takes 255 registers and spills 29 in the 128 x 128 x 64 tile, with
    it 182 and none.
    """
    tile = forward_tile(problem, itemsize, target, norm)
    depth = problem.source_channels
    if problem.packed:
        depth *= problem.axes[2][0] * problem.axes[3][0] * problem.axes[4][0]
    m, n, k = _fit(tile.m, problem.plane), _fit(tile.n, problem.target_channels), _fit(tile.k, depth)
    grid = problem.planes * _ceil(problem.plane, m) * _ceil(problem.target_channels, n) * problem.groups
    constants = {
        **problem.constants(),
        "TRANSPOSED": problem.transposed,
        "NORM": norm,
        "ACTIVATION": activation,
        "KEEP": keep,
        "PRECISION": precision,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
    }
    kernel = conv_packed if problem.packed else conv_taps
    return Launch(kernel, grid, problem.integers(), constants, tile.warps, tile.stages)


def weight_launch(problem: Problem, itemsize: int, target: int, *, precision: str) -> Launch:
    """The launch of a weight gradient into `splits` partials of [groups, taps, KG, NG] fp32."""
    tile = tile_for("weight", itemsize, target)
    rows, tiles = problem.source_channels, problem.taps
    if problem.packed:
        rows *= problem.axes[2][0] * problem.axes[3][0] * problem.axes[4][0]
        tiles = problem.axes[0][0] * problem.axes[1][0]
    m_limit = tile.m if not problem.packed else tile.m // 2  # packed: two index tensors of [k, m] beside the sums
    m, n, k = _fit(m_limit, rows), _fit(tile.n, problem.target_channels), _fit(tile.k, problem.plane)
    programs = tiles * _ceil(rows, m) * _ceil(problem.target_channels, n) * problem.groups
    one = 4 * problem.groups * problem.taps * problem.source_channels * problem.target_channels
    splits = max(1, min(WEIGHT_PROGRAMS // programs, PARTIAL_BYTES // one, problem.planes))
    constants = {
        **problem.constants(),
        "PRECISION": precision,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
    }
    kernel = weight_packed if problem.packed else weight_taps
    integers = {"PLANES": problem.planes, **problem.integers()}
    return Launch(kernel, programs * splits, integers, constants, tile.warps, tile.stages, splits)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _fit(limit: int, size: int) -> int:
    """The smallest power of two in [16, limit] that covers `size`, else `limit`: tensor cores take no less than 16."""
    return min(limit, max(16, 1 << (size - 1).bit_length()))
