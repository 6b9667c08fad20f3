"""Atomic operations on global memory, in the order of blocks and threads."""

from collections.abc import Callable

import numpy as np

from astrobiogen.testing.ptx.machine.lanes import VIEWS, Lanes, Mask
from astrobiogen.testing.ptx.machine.memory import RAW
from astrobiogen.testing.ptx.machine.program import BYTES, Instruction, UnsupportedInstructionError

OPERATIONS: dict[str, Callable[..., np.generic]] = {
    "add": lambda old, value: old + value,
    "min": lambda old, value: min(old, value),
    "max": lambda old, value: max(old, value),
    "and": lambda old, value: old & value,
    "or": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "exch": lambda _, value: value,
    "cas": lambda old, expected, value: value if old == expected else old,
}


def _update(lanes: Lanes, step: Instruction, address: str, values: tuple[str, ...], mask: Mask) -> np.ndarray:
    """Apply the operation lane by lane; the old values, [active lanes]."""
    name = next((part for part in step.modifiers if part in OPERATIONS), "")
    if not name or "global" not in step.modifiers or step.type not in VIEWS:
        raise UnsupportedInstructionError(step.text)
    kind, width, active = VIEWS[step.type], BYTES[step.type], lanes.active(mask)
    at = lanes.global_address(address)[active]
    operands = [lanes.value(value, step.type)[active] for value in values]
    old = np.empty(len(active), kind)
    for chosen, region in lanes.memory.update(at, width, "an atomic operation"):
        for lane in np.arange(len(active))[chosen]:
            here = at[lane : lane + 1]
            old[lane] = region.load(here, width, 1).view(kind)[0, 0]
            new = kind(OPERATIONS[name](old[lane], *(operand[lane] for operand in operands)))
            region.store(here, np.array([[new]], kind).view(RAW[width]))
    return old


def _atomic(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    target, address, *values = step.operands
    lanes.spread(
        target, lanes.active(mask), _update(lanes, step, address, tuple(values), mask).view(RAW[BYTES[step.type]])
    )


def _reduce(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    address, *values = step.operands
    _update(lanes, step, address, tuple(values), mask)


HANDLERS = {"atom": _atomic, "red": _reduce}
