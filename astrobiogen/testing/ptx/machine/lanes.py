"""The threads of several blocks as lanes of NumPy arrays: registers, operands, addresses.

All lanes run in step; where they part, the lowest program counter runs first (see `execution.py`). Registers hold raw
unsigned numbers of their width, or bool for predicates; instructions look at them through a type.
"""

from collections.abc import Sequence

import numpy as np

from astrobiogen.testing.ptx.machine.copies import Copies
from astrobiogen.testing.ptx.machine.memory import RAW, GlobalMemory
from astrobiogen.testing.ptx.machine.program import BYTES, Program, UnsupportedInstructionError
from astrobiogen.testing.ptx.machine.shared import SharedMemory

# How a PTX type is seen by NumPy; bf16 has no type there.
VIEWS = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
WARP = 32
SHARED_SYMBOL = "global_smem"  # Triton's name for the whole of a block's shared memory
Mask = np.ndarray | None  # which lanes take part; None: all


class Lanes:
    """State of the threads of the blocks `blocks` [n, 3] of one launch.

    Attributes:
        count: lanes, blocks * threads.
        thread: of its block, per lane. warp: of its block. lane: of its warp. slot: which of `blocks`.
    """

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int],
        memory: GlobalMemory,
        shared: SharedMemory,
        blocks: np.ndarray,
        grid: Sequence[int],
    ) -> None:
        self.program, self.arguments, self.memory, self.shared = program, arguments, memory, shared
        self.copies = Copies(shared, len(blocks) * program.threads)
        self.count = len(blocks) * program.threads
        everyone = np.arange(self.count)
        self.thread = (everyone % program.threads).astype(np.uint32)
        self.slot = everyone // program.threads
        self.warp = (self.thread // WARP).astype(np.int32)
        self.lane = self.thread % np.uint32(WARP)
        self.base = self.slot * shared.stride  # of a lane's shared memory
        strides = np.array([1, grid[0], grid[0] * grid[1]])
        self.block = (blocks @ strides)[self.slot].astype(np.int32)
        self._registers: dict[str, np.ndarray] = {}
        self._special = {"%laneid": self.lane, "%tid.x": self.thread}
        for axis, letter in enumerate("xyz"):
            self._special[f"%ctaid.{letter}"] = blocks[self.slot, axis].astype(np.uint32)
            self._special[f"%nctaid.{letter}"] = np.full(self.count, grid[axis], np.uint32)
            self._special.setdefault(f"%tid.{letter}", np.zeros(self.count, np.uint32))
        self._special["%ntid.x"] = np.full(self.count, program.threads, np.uint32)
        self._constants: dict[tuple[str, int], np.ndarray] = {}

    def raw(self, operand: str, width: int) -> np.ndarray:
        """The operand's bits, [lanes] unsigned of `width` bytes."""
        if operand[0] == "%":
            value = self._special.get(operand)
            if value is None:
                value = self._registers.get(operand)
            if value is None:  # what a register holds that nobody has written, nobody knows
                value = self._registers[operand] = np.full(self.count, -1, np.int64).astype(RAW[width])
            return value if value.dtype.itemsize == width or value.dtype == bool else value.astype(RAW[width])
        value = self._constants.get((operand, width))
        if value is None:
            value = self._constants[operand, width] = np.full(self.count, _constant(operand, width), RAW[width])
        return value

    def value(self, operand: str, kind: str) -> np.ndarray:
        """The operand as numbers of the PTX type `kind`, [lanes]."""
        return self.raw(operand, BYTES[kind]).view(VIEWS[kind])

    def truth(self, operand: str) -> np.ndarray:
        """A predicate operand, [lanes] bool."""
        if operand in ("0", "1", "-1"):
            return np.full(self.count, operand != "0")
        return ~self._registers[operand[1:]] if operand[0] == "!" else self._registers[operand]

    def put(self, register: str, value: np.ndarray, mask: Mask) -> None:
        """Write a register where `mask`; "_" takes nothing."""
        if register == "_":
            return
        if value.dtype != bool:
            value = value.view(RAW[value.dtype.itemsize])
        if mask is not None:
            old = self._registers.get(register)
            if old is None or old.dtype != value.dtype:
                old = np.zeros_like(value) if old is None else old.astype(value.dtype)
            value = np.where(mask, value, old)
        self._registers[register] = value

    def spread(self, register: str, active: np.ndarray, value: np.ndarray) -> None:
        """Write `value` [active] to the lanes with the numbers `active`."""
        full = np.zeros(self.count, value.dtype) if len(active) != self.count else value
        if len(active) != self.count:
            full[active] = value
            mask = np.zeros(self.count, bool)
            mask[active] = True
            self.put(register, full, mask)
        else:
            self.put(register, full, None)

    def active(self, mask: Mask) -> np.ndarray:
        """Numbers of the lanes that take part."""
        return np.arange(self.count) if mask is None else np.flatnonzero(mask)

    def global_address(self, operand: str) -> np.ndarray:
        """Address operand ``[register+offset]`` in global memory, uint64 [lanes]."""
        base, offset = _address(operand)
        return self.raw(base, 8) + np.uint64(offset % 2**64)

    def shared_address(self, operand: str) -> np.ndarray:
        """Address operand in shared memory, int64 [lanes], counted from the first block's."""
        base, offset = _address(operand)
        if base == SHARED_SYMBOL:
            return self.base + offset
        register = self._registers.get(base)
        width = 4 if register is None else register.dtype.itemsize
        return self.base + self.raw(base, width).astype(np.int64) + offset

    def whole_warps(self, mask: Mask, what: str) -> None:
        """UnsupportedInstructionError unless all threads of every warp take part or none."""
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise UnsupportedInstructionError(f"{what} by a part of a warp")


def registers(operand: str) -> list[str]:
    """Names in ``{a, b}``, or the single one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _address(operand: str) -> tuple[str, int]:
    base, _, offset = operand.strip("[] ").partition("+")
    return base.strip(), int(offset) if offset.strip() else 0


def _constant(operand: str, width: int) -> int:
    """An immediate operand's bits; the address of shared memory is 0."""
    if operand == SHARED_SYMBOL:
        return 0
    if operand[:2] in ("0f", "0F", "0d", "0D"):
        return int(operand[2:], 16)
    return int(operand.rstrip("U"), 0) % 2 ** (8 * width)
