"""Reading `nvdisasm` listings: instructions, branch targets, and which loop each instruction is in."""

import dataclasses
import re

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)\s*(.*?)\s*;?\s*\}?\s*$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction, e.g. opcode ``"LDG.E.128"``; `guarded`: a predicate may switch it off."""

    opcode: str
    operands: str
    guarded: bool = False

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions first .. last; `parent`: index of the loop around it, -1 for none."""

    first: int
    last: int
    parent: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """A kernel's instructions in order, and the instruction at which each label stands."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Listing:
    """Read the output of ``nvdisasm -c -ndf``."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        found = _INSTRUCTION.search(line)
        if found:
            guard, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands, bool(guard)))
    return Listing(tuple(instructions), labels)


def loops(listing: Listing) -> list[Loop]:
    """Loops in code order, outer before inner: every branch back to an earlier label. Two branches to one label are one
    loop. The branch to itself that fills the end of a kernel is none.
    """
    ends: dict[int, int] = {}
    for index, instruction in enumerate(listing.instructions):
        target = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
        first = listing.labels.get(target.group(1), index) if target else index
        if first < index:
            ends[first] = max(index, ends.get(first, 0))
    found: list[Loop] = []
    for first, last in sorted(ends.items()):
        around = [i for i, loop in enumerate(found) if loop.first < first and last <= loop.last]
        found.append(Loop(first, last, around[-1] if around else -1))
    return found


def busiest_path(listing: Listing) -> list[bool]:
    """For each instruction whether it is on the longest way through the code that takes no branch back: of two
    alternatives, such as a tile with and without a mask, the longer one.
    """
    count = len(listing.instructions)
    length, following = [0] * (count + 1), [count] * count
    for index in reversed(range(count)):
        instruction = listing.instructions[index]
        leaves = instruction.base in ("EXIT", "BRA", "RET") and not instruction.guarded
        ways = [count if leaves else index + 1]
        if instruction.base == "BRA":
            ways += [listing.labels[name] for name in _TARGET.findall(instruction.operands)]
        ways = [way for way in ways if way > index]
        following[index] = max(ways, key=lambda way: length[way], default=count)
        length[index] = 1 + length[following[index]]
    on_path, index = [False] * count, 0
    while index < count:
        on_path[index] = True
        index = following[index]
    return on_path


def owners(listing: Listing) -> list[int]:
    """For each instruction the index of the innermost loop that holds it, -1 outside of loops."""
    inside = [-1] * len(listing.instructions)
    for number, loop in enumerate(loops(listing)):
        inside[loop.first : loop.last + 1] = [number] * (loop.last + 1 - loop.first)
    return inside
