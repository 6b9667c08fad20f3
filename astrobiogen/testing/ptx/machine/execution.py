"""Running a program: control flow of the lanes, and the blocks of a grid."""

from collections.abc import Sequence

import numpy as np
import torch

from astrobiogen.testing.ptx.machine import arithmetic, atomics, matrix, movement
from astrobiogen.testing.ptx.machine.findings import Findings, KernelError
from astrobiogen.testing.ptx.machine.lanes import Lanes, Mask
from astrobiogen.testing.ptx.machine.memory import GlobalMemory
from astrobiogen.testing.ptx.machine.program import Instruction, Program, UnsupportedInstructionError
from astrobiogen.testing.ptx.machine.shared import SharedMemory

HANDLERS = arithmetic.HANDLERS | movement.HANDLERS | matrix.HANDLERS | atomics.HANDLERS
# Lanes that run in step: NumPy's cost per instruction is spread over them, and arrays of them stay in the cache.
LANES = 2048
MOST_INSTRUCTIONS = 20_000_000  # of one batch of blocks: a loop that does not end


class _Flow:
    """Program counters: one for all lanes, or one per lane where they have parted."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._end = len(lanes.program.code)
        self._common = 0
        self._each: np.ndarray | None = None

    def next(self) -> tuple[int, Mask]:
        """(program counter, which lanes are there); past the end when all have left."""
        if self._each is None:
            return self._common, None
        counter = int(self._each.min())
        here = self._each == counter
        if here.all():
            self._common, self._each = counter, None
            return counter, None
        return counter, here

    def advance(self, here: Mask, counter: int) -> None:
        """The lanes go on to `counter`."""
        if here is None and self._each is None:
            self._common = counter
        else:
            self._part(here, counter)

    def jump(self, here: Mask, taken: Mask, target: int, otherwise: int) -> None:
        """Of the lanes `here`, those in `taken` go to `target`, the others to `otherwise`."""
        everyone = here is None
        if taken is None or (everyone and taken.all()):
            self.advance(here, target)
        elif everyone and not taken.any():
            self.advance(here, otherwise)
        else:
            self._part(here, otherwise)
            self._part(taken if everyone else taken & here, target)

    def leave(self, here: Mask, taken: Mask, otherwise: int) -> None:
        """Lanes in `taken` are done."""
        self.jump(here, taken, self._end, otherwise)

    def _part(self, here: Mask, counter: int) -> None:
        if self._each is None:
            self._each = np.full(self._lanes.count, self._common)
        self._each = np.where(here, counter, self._each) if here is not None else np.full_like(self._each, counter)


def run_lanes(lanes: Lanes) -> int:
    """Run all lanes to their end; how many instructions that took."""
    code, labels, flow = lanes.program.code, lanes.program.labels, _Flow(lanes)
    done = 0
    while True:
        counter, here = flow.next()
        if counter >= len(code):
            return done
        step = code[counter]
        done += 1
        if done > MOST_INSTRUCTIONS:
            raise KernelError(f"more than {MOST_INSTRUCTIONS} instructions: a loop that does not end, at {step.where}")
        taken: Mask = None
        if step.predicate is not None:
            name, negated = step.predicate
            taken = ~lanes.truth(name) if negated else lanes.truth(name)
        if step.name == "bra":
            flow.jump(here, taken, labels[step.operands[0]], counter + 1)
        elif step.name in ("ret", "exit"):
            flow.leave(here, taken, counter + 1)
        else:
            flow.advance(here, counter + 1)
            mask = taken if here is None else here if taken is None else here & taken
            if mask is None or mask.any():
                _execute(lanes, step, None if mask is not None and mask.all() else mask)


def _execute(lanes: Lanes, step: Instruction, mask: Mask) -> None:
    handler = HANDLERS.get(step.name)
    if handler is None:
        raise UnsupportedInstructionError(f"{step.text} at {step.where}")
    try:
        handler(lanes, step, mask)
    except KernelError as fault:
        raise KernelError(f"{fault}, in `{step.text}` at {step.where}") from None
    except (KeyError, ValueError) as error:
        raise UnsupportedInstructionError(f"{step.text} at {step.where}: {type(error).__name__}: {error}") from error


def run_grid(
    program: Program, shared_bytes: int, grid: Sequence[int], arguments: Sequence[int | float | bool | torch.Tensor],
    names: Sequence[str], findings: Findings,
) -> int:  # fmt: skip
    """Run every block of a launch on CPU tensors, in order, as many together as make `LANES` lanes.

    Args:
        program: of `parse`.
        shared_bytes: dynamic shared memory of a block.
        grid: three numbers of blocks.
        arguments: in the order of the program's parameters; further parameters of the program are 0.
        names: of the arguments.
        findings: takes what is found.

    Returns:
        Number of instructions, one for all lanes that ran it together.

    Raises:
        KernelError: the kernel did what would end it on a GPU.
        UnsupportedInstructionError: it uses an instruction that is not emulated.
    """
    tensors = [(name, value) for name, value in zip(names, arguments) if isinstance(value, torch.Tensor)]
    memory = GlobalMemory(tensors, program.granule("global"), findings)
    bits = [_bits(value, kind) for value, kind in zip(arguments, program.parameters)]
    bits += [0] * (len(program.parameters) - len(bits))
    order = np.stack(np.meshgrid(*(np.arange(size) for size in reversed(grid)), indexing="ij"), -1).reshape(-1, 3)
    blocks, together = order[:, ::-1], max(1, LANES // program.threads)
    done = 0
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), together):
            batch = blocks[first : first + together]
            shared = SharedMemory(shared_bytes, len(batch), program.granule("shared"), findings)
            done += run_lanes(Lanes(program, bits, memory, shared, batch, grid))
    return done


def _bits(value: int | float | bool | torch.Tensor, kind: str) -> int:
    """An argument as the bits of a parameter of PTX type `kind`."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        wide = kind in ("f64", "b64", "u64")
        return int(np.float64(value).view(np.uint64)) if wide else int(np.float32(value).view(np.uint32))
    return int(value) % 2**64
