"""What the GPUs of the speed model can do. Peaks are the makers' figures; what is assumed says so."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one multiprocessor of a compute capability has (CUDA C++ Programming Guide, table of technical
    specifications).
    """

    warps: int
    blocks: int
    shared_per_sm: int
    shared_per_block: int


LIMITS = {
    80: Limits(64, 32, 167_936, 166_912),
    86: Limits(48, 16, 102_400, 101_376),
    89: Limits(48, 24, 102_400, 101_376),
    90: Limits(64, 32, 233_472, 232_448),
    120: Limits(48, 24, 102_400, 101_376),
}
REGISTERS_PER_SM = 65_536
# Registers are handed out per warp in units of 256; every block costs 1 KB of shared memory that it cannot use.
REGISTER_UNIT = 256
RESERVED_SHARED = 1_024
WARP = 32
QUARTERS = 4  # schedulers per multiprocessor, each with its own matrix unit


@dataclasses.dataclass(frozen=True)
class Machine:
    """One GPU.

    Attributes:
        name: of the product.
        arch: compute capability, e.g. 86.
        multiprocessors: on the card.
        clock: boost, Hz, at which the peaks hold.
        sustained: Hz, what the power limit leaves while the matrix units work; calibrated, see `docs/gpu_evidence.md`.
        mma: multiply-adds per cycle and quarter of a multiprocessor, 16-bit operands, by `mma.sync`.
        wgmma: the same by `wgmma`, 0 where there is none.
        memory: peak bytes per second.
        cache: bytes per cycle and multiprocessor from the second-level cache; assumed for the A5000 and H200.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    sustained: float
    mma: float
    wgmma: float
    memory: float
    cache: float

    @property
    def matrix_peak(self) -> float:
        """Multiply-adds per second of the fastest matrix instruction."""
        return max(self.mma, self.wgmma) * QUARTERS * self.multiprocessors * self.clock


# NVIDIA's data sheets: RTX A5000 27.8 TFLOP/s fp32 (8,192 lanes at 1.695 GHz), 111 dense 16-bit; H200 989 dense 16-bit.
# `mma.sync` on sm_90 reaches about 62 % of `wgmma`: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
# Architecture" (arXiv 2402.13499).
MACHINES = {
    86: Machine("RTX A5000", 86, 64, 1.695e9, 1.36e9, 128, 0, 768e9, 32),
    90: Machine("H200", 90, 132, 1.83e9, 1.44e9, 317, 512, 4.8e12, 39),
}


def resident(target: int, warps: int, registers: int, shared: int) -> int:
    """Programs of this size that one multiprocessor holds at once; 0 if none fits."""
    limits = LIMITS[target]
    per_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps // warps,
        REGISTERS_PER_SM // per_warp // warps,
        limits.shared_per_sm // (shared + RESERVED_SHARED),
    )


def occupancy(target: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that programs of this size can fill."""
    return round(resident(target, warps, registers, shared) * warps / LIMITS[target].warps, 3)
