"""PTX text to instructions.

Only what Triton emits is read: one entry function, virtual registers, labels, predicates. Grammar: NVIDIA, Parallel
Thread Execution ISA, chapters 4 and 9.
"""

import dataclasses
import re

ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(?:\.\w+ [^\n{]*\s*)*\{(.*)\n\}", re.DOTALL)
PARAMETER = re.compile(r"\.param \.(\w+)[^,]*?(\w+_param_\d+)")
THREADS = re.compile(r"\.reqntid (\d+)")
LOCATION = re.compile(r"// *(\S+:\d+)")
LABEL = re.compile(r"^(\$?\w+):$")
PREDICATE = re.compile(r"^@(!?)(%\w+)\s+(.*)$")

# Bytes of a value by its PTX type.
BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip


class UnsupportedInstructionError(Exception):
    """The program uses an instruction, or a form of one, that the emulator does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        name: of its family, the part before the first dot, e.g. ``"ld"``.
        modifiers: the other parts, e.g. ``("global", "v4", "b32")``.
        operands: as written; brackets and braces are kept.
        predicate: (register, negated), or None.
        where: source line of the kernel, as far as the compiler says so.
        text: as written, without the predicate.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None
    where: str
    text: str

    @property
    def type(self) -> str:
        """The last modifier, which is the type of the operands in most families."""
        return self.modifiers[-1]


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel's PTX.

    Attributes:
        name: of the entry function.
        parameters: PTX types of its parameters, in order.
        threads: per block.
        code: its instructions.
        labels: label -> index of the instruction behind it.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    def granule(self, space: str) -> int:
        """Bytes of the narrowest access to memory of the `space` "shared" or "global", at most 4: the unit by which
        neighbouring data can be told apart."""
        narrowest = 4
        for step in self.code:
            if step.name in ("ld", "st") and space in step.modifiers[0]:
                narrowest = min(narrowest, BYTES.get(step.type, 4))
        return narrowest


def parse(ptx: str) -> Program:
    """Read the PTX of one kernel.

    Raises:
        ValueError: there is no entry function, or it does not say how many threads it needs.
    """
    entry, threads = ENTRY.search(ptx), THREADS.search(ptx)
    if entry is None or threads is None:
        raise ValueError("expected PTX with one .visible .entry function and its .reqntid, got neither or one of them")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    where, pending = "", ""
    for raw in entry.group(3).splitlines():
        if ".loc" in raw:
            found = LOCATION.search(raw)
            where = found.group(1) if found else where
        line = pending + raw.split("//")[0].strip()
        pending = ""
        label = LABEL.match(line)
        if label:
            labels[label.group(1)] = len(code)
        elif line and line not in ("{", "}") and not line.startswith("."):
            if not line.endswith(";"):
                pending = line + " "
                continue
            code += [_instruction(part, where) for part in line.split(";") if _is_code(part)]
    parameters = tuple(kind for kind, _ in PARAMETER.findall(entry.group(2)))
    return Program(entry.group(1), parameters, int(threads.group(1)), tuple(code), labels)


def _is_code(part: str) -> bool:
    """Whether a statement is an instruction; inline assembly may stand in braces and declare registers."""
    body = part.strip(" {}\t") if part.strip().startswith("{ .reg") else part.strip()
    return bool(body) and not body.startswith((".", "{ .")) and body not in ("{", "}")


def _instruction(part: str, where: str) -> Instruction:
    text = part.strip()
    predicate = None
    found = PREDICATE.match(text)
    if found:
        predicate = (found.group(2), found.group(1) == "!")
        text = found.group(3)
    opcode, _, rest = text.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(name, tuple(modifiers), _operands(rest.strip()), predicate, where, text)


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside brackets and braces."""
    parts: list[str] = []
    depth, current = 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return (*parts, current.strip()) if current.strip() else tuple(parts)
