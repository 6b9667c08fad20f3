"""Moves, conversions, loads, stores, asynchronous copies, shuffles and barriers."""

import re

import numpy as np

from astrobiogen.testing.ptx.machine.findings import KernelError
from astrobiogen.testing.ptx.machine.lanes import VIEWS, WARP, Lanes, Mask, registers
from astrobiogen.testing.ptx.machine.memory import RAW
from astrobiogen.testing.ptx.machine.numbers import HALF_FORMATS, pair, to_tf32
from astrobiogen.testing.ptx.machine.program import BYTES, Instruction, UnsupportedInstructionError

PARAMETER = re.compile(r"_param_(\d+)")
ROUNDINGS = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


def _move(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    target, source = step.operands
    if step.type == "pred":
        lanes.put(target, lanes.truth(source), mask)
        return
    width = BYTES[step.type]
    if target.startswith("{"):
        names, value = registers(target), lanes.raw(source, width)
        part = width // len(names)
        for place, name in enumerate(names):
            lanes.put(name, (value >> RAW[width](8 * part * place)).astype(RAW[part]), mask)
    elif source.startswith("{"):
        names = registers(source)
        part, value = width // len(names), np.zeros(lanes.count, RAW[width])
        for place, name in enumerate(names):
            value |= lanes.raw(name, part).astype(RAW[width]) << RAW[width](8 * part * place)
        lanes.put(target, value, mask)
    else:
        lanes.put(target, lanes.raw(source, width).copy(), mask)


def _to_address_space(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    lanes.put(step.operands[0], lanes.raw(step.operands[1], 8), mask)


def _convert(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    to, of = step.modifiers[-2:]
    target, source = step.operands[:2]
    if to in ("bf16x2", "f16x2"):
        narrow = HALF_FORMATS[to[:-2]][1]
        high, low = (narrow(lanes.value(operand, "f32")) for operand in step.operands[1:])
        lanes.put(target, pair(low, high), mask)
    elif to == "tf32":
        lanes.put(target, to_tf32(lanes.raw(source, 4)), mask)
    elif to in HALF_FORMATS:
        value = lanes.value(source, of).astype(np.float32)
        lanes.put(target, HALF_FORMATS[to][1](value), mask)
    else:
        value = HALF_FORMATS[of][0](lanes.raw(source, 2)) if of in HALF_FORMATS else lanes.value(source, of)
        if value.dtype.kind == "f" and to[0] in "us":
            value = _to_integer(value, to, step.modifiers)
        lanes.put(target, value.astype(VIEWS[to]), mask)


def _to_integer(value: np.ndarray, to: str, modifiers: tuple[str, ...]) -> np.ndarray:
    """Rounded as the modifiers say, and held inside the type's range; NaN becomes 0."""
    rounding = next((ROUNDINGS[name] for name in modifiers if name in ROUNDINGS), np.trunc)
    limits = np.iinfo(VIEWS[to])
    rounded = rounding(np.where(np.isnan(value), 0.0, value).astype(np.float64))
    inside = np.clip(rounded, float(limits.min), float(limits.max))
    top = rounded >= float(limits.max)  # 2^63 - 1 is no fp64 number
    return np.where(top, VIEWS[to](limits.max), np.where(top, 0.0, inside).astype(VIEWS[to]))


def _load(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    space, width = step.modifiers[0].split("::")[0], BYTES[step.type]
    if space == "param":
        _load_parameter(lanes, step, mask)
        return
    names, active = registers(step.operands[0]), lanes.active(mask)
    if space == "shared":
        address = lanes.shared_address(step.operands[1])[active]
        values = lanes.shared.load(address, width, len(names), lanes.warp[active], step.where)
    elif space == "global":
        address = lanes.global_address(step.operands[1])[active]
        values = lanes.memory.load(address, width, len(names), lanes.block[active], step.where)
    else:
        raise UnsupportedInstructionError(step.text)
    for place, name in enumerate(names):
        value = np.ascontiguousarray(values[:, place])
        lanes.spread(name, active, value.astype(np.uint16) if width == 1 else value)


def _load_parameter(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    found = PARAMETER.search(step.operands[1])
    assert found is not None, step.text
    bits, width = lanes.arguments[int(found.group(1))], BYTES[step.type]
    value = np.full(lanes.count, bits % 2 ** (8 * width), RAW[width])
    if step.operands[0].startswith("%rd") and width < 8:  # into a wider register: signed types keep their sign
        value = value.view(VIEWS[step.type]).astype(np.int64)
    lanes.put(step.operands[0], value, mask)


def _store(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    space, width = step.modifiers[0].split("::")[0], BYTES[step.type]
    active = lanes.active(mask)
    columns = [lanes.raw(name, width)[active] for name in registers(step.operands[1])]
    values = np.stack(columns, 1)
    if space == "shared":
        lanes.shared.store(lanes.shared_address(step.operands[0])[active], values, lanes.warp[active], step.where)
    elif space == "global":
        lanes.memory.store(lanes.global_address(step.operands[0])[active], values, lanes.block[active], step.where)
    else:
        raise UnsupportedInstructionError(step.text)


def _copy(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    active = lanes.active(mask)
    if "commit_group" in step.modifiers:
        lanes.copies.commit(active)
        return
    if "wait_all" in step.modifiers:
        lanes.copies.commit(active)
    if "wait_group" in step.modifiers or "wait_all" in step.modifiers:
        lanes.copies.wait(active, int(step.operands[0], 0) if step.operands else 0)
        return
    if step.modifiers[0] != "async" or "bulk" in step.modifiers:
        raise UnsupportedInstructionError(step.text)
    target, source, size, *rest = step.operands
    address, origin = lanes.shared_address(target)[active], lanes.global_address(source)[active]
    rows = np.zeros((len(active), int(size, 0)), np.uint8)  # bytes beyond the source's size are 0
    taken = lanes.raw(rest[0], 4)[active] if rest else np.full(len(active), rows.shape[1])
    if not np.isin(taken, (0, rows.shape[1])).all():
        raise UnsupportedInstructionError(f"{step.text} with a part of the bytes")
    live = np.flatnonzero(taken)
    unit = min(8, rows.shape[1])
    loaded = lanes.memory.load(origin[live], unit, rows.shape[1] // unit, lanes.block[active][live], step.where)
    rows[live] = loaded.view(np.uint8)
    lanes.copies.begin(active, address, rows, lanes.warp[active], step.where)


def _barrier(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    if "warp" in step.modifiers:
        return
    if step.operands[:1] not in ((), ("0",)):
        raise UnsupportedInstructionError(f"{step.text}: only barrier 0")
    here = np.ones(lanes.count, bool) if mask is None else mask
    blocks = here.reshape(-1, lanes.program.threads)
    if (blocks.any(1) != blocks.all(1)).any():
        raise KernelError(f"barrier that only a part of a block's threads reaches, at {step.where}")
    lanes.shared.barrier(np.flatnonzero(blocks.any(1)))


def _nothing(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    """Fences order memory; here every access is complete at once."""
    del lanes, step, mask


def _shuffle(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    lanes.whole_warps(mask, "shfl")
    value, by, lane = lanes.raw(step.operands[1], 4), lanes.raw(step.operands[2], 4), lanes.lane
    how = step.modifiers[1]
    moved = {
        "bfly": lambda: lane ^ by,
        "idx": lambda: by & np.uint32(WARP - 1),
        "up": lambda: np.where(lane >= by, lane - by, lane),
        "down": lambda: np.where(lane + by < WARP, lane + by, lane),
    }[how]()
    first = np.arange(lanes.count) - lane
    lanes.put(step.operands[0].split("|")[0], value[first + moved], mask)


def _elect(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    """vote.sync.ballot, any, all."""
    lanes.whole_warps(mask, "vote")
    truth = lanes.truth(step.operands[1]).reshape(-1, WARP)
    how = step.modifiers[1]
    if how == "ballot":
        result = (truth.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
    elif how in ("any", "all"):
        result = truth.any(1) if how == "any" else truth.all(1)
    else:
        raise UnsupportedInstructionError(step.text)
    lanes.put(step.operands[0], np.repeat(result, WARP), mask)


def _reduce_warp(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    """redux.sync: one integer operation over a warp."""
    lanes.whole_warps(mask, "redux")
    operations = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                  "xor": np.bitwise_xor}  # fmt: skip
    operation = operations[step.modifiers[1]]
    values = lanes.value(step.operands[1], step.type).reshape(-1, WARP)
    lanes.put(step.operands[0], np.repeat(operation.reduce(values, 1, dtype=values.dtype), WARP), mask)


HANDLERS = {
    "mov": _move, "cvta": _to_address_space, "cvt": _convert, "ld": _load, "st": _store, "cp": _copy, "bar": _barrier,
    "barrier": _barrier, "fence": _nothing, "membar": _nothing, "shfl": _shuffle, "vote": _elect,
    "redux": _reduce_warp,
}  # fmt: skip
