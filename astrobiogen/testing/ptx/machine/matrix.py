"""Tensor-core instructions of sm_80: `ldmatrix`, and `mma.sync` of bf16, fp16 and tf32 with fp32 sums.

Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "m16n8k8". A product of one instruction is summed
in fp64 and rounded once; hardware keeps fewer bits while it sums, in an order that NVIDIA does not document.
"""

import numpy as np

from astrobiogen.testing.ptx.machine.lanes import WARP, Lanes, Mask, registers
from astrobiogen.testing.ptx.machine.numbers import HALF_FORMATS, TF32_DROPPED, halves, pair
from astrobiogen.testing.ptx.machine.program import Instruction, UnsupportedInstructionError

ROWS, COLUMNS = 16, 8  # of a result
LANE = np.arange(WARP)
GROUP, PLACE = LANE >> 2, LANE & 3


def _load_matrix(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    """One to four 8 x 8 matrices of 16-bit elements per warp; lanes 8i to 8i + 7 give the row addresses of matrix i."""
    lanes.whole_warps(mask, "ldmatrix")
    count = next(int(name[1:]) for name in step.modifiers if name in ("x1", "x2", "x4"))
    warps = np.arange(lanes.count // WARP) if mask is None else np.flatnonzero(mask.reshape(-1, WARP)[:, 0])
    address = lanes.shared_address(step.operands[1]).reshape(-1, WARP)[warps, : 8 * count]
    who = np.repeat(lanes.warp.reshape(-1, WARP)[warps, 0], 8 * count)
    rows = lanes.shared.load(address.reshape(-1), 8, 2, who, step.where)
    matrices = rows.view(np.uint16).reshape(len(warps), count, 8, 8)
    active = (warps[:, None] * WARP + LANE).reshape(-1)
    for place, register in enumerate(registers(step.operands[0])):
        matrix = matrices[:, place]
        if "trans" in step.modifiers:
            low, high = matrix[:, 2 * PLACE, GROUP], matrix[:, 2 * PLACE + 1, GROUP]
        else:
            low, high = matrix[:, GROUP, 2 * PLACE], matrix[:, GROUP, 2 * PLACE + 1]
        lanes.spread(register, active, pair(low, high).reshape(-1))


def _half_operands(lanes: Lanes, kind: str, a: list[str], b: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """A [warps, 16, depth] and B [warps, depth, 8] from registers of two 16-bit numbers."""
    widen, warps = HALF_FORMATS[kind][0], lanes.count // WARP
    left, right = np.empty((warps, ROWS, depth), np.float32), np.empty((warps, depth, COLUMNS), np.float32)
    for place, register in enumerate(a):
        low, high = (widen(half).reshape(warps, WARP) for half in halves(lanes.raw(register, 4)))
        row, column = GROUP + 8 * (place & 1), 2 * PLACE + 8 * (place >> 1)
        left[:, row, column], left[:, row, column + 1] = low, high
    for place, register in enumerate(b):
        low, high = (widen(half).reshape(warps, WARP) for half in halves(lanes.raw(register, 4)))
        row = 2 * PLACE + 8 * place
        right[:, row, GROUP], right[:, row + 1, GROUP] = low, high
    return left, right


def _tf32_operands(lanes: Lanes, a: list[str], b: list[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from fp32 registers; the lowest 13 bits are not read."""
    warps = lanes.count // WARP
    left, right = np.empty((warps, ROWS, depth), np.float32), np.empty((warps, depth, COLUMNS), np.float32)

    def cut(register: str) -> np.ndarray:
        return (lanes.raw(register, 4) & ~TF32_DROPPED).view(np.float32).reshape(warps, WARP)

    for place, register in enumerate(a):
        left[:, GROUP + 8 * (place & 1), PLACE + 4 * (place >> 1)] = cut(register)
    for place, register in enumerate(b):
        right[:, PLACE + 4 * place, GROUP] = cut(register)
    return left, right


def _multiply(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    """D = A B + C, 16 x 8, per warp."""
    lanes.whole_warps(mask, "mma")
    shape = next((name for name in step.modifiers if name.startswith("m16n8k")), "")
    sums, kind, kind_b, result = step.modifiers[-4:]
    d, a, b, c = (registers(operand) for operand in step.operands)
    if kind != kind_b or (sums, result) != ("f32", "f32") or shape[5:] == "":
        raise UnsupportedInstructionError(step.text)
    depth = int(shape[6:])
    if kind in HALF_FORMATS and depth in (8, 16):
        left, right = _half_operands(lanes, kind, a, b, depth)
    elif kind == "tf32" and depth in (4, 8):
        left, right = _tf32_operands(lanes, a, b, depth)
    else:
        raise UnsupportedInstructionError(step.text)
    warps = lanes.count // WARP
    total = np.empty((warps, ROWS, COLUMNS), np.float64)
    for place, register in enumerate(c):
        number = lanes.value(register, "f32").reshape(warps, WARP)
        total[:, GROUP + 8 * (place >> 1), 2 * PLACE + (place & 1)] = number
    total = (total + np.matmul(left.astype(np.float64), right.astype(np.float64))).astype(np.float32)
    for place, register in enumerate(d):
        part = total[:, GROUP + 8 * (place >> 1), 2 * PLACE + (place & 1)]
        lanes.put(register, np.ascontiguousarray(part).reshape(-1), mask)


HANDLERS = {"ldmatrix": _load_matrix, "mma": _multiply}
