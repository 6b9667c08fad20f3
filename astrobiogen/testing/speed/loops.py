"""What one warp does in each loop of a kernel, counted from its machine code. Nested loops are counted apart: an outer
loop's figures are those of its own instructions.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

from astrobiogen.testing.speed import sass
from astrobiogen.testing.speed.machines import QUARTERS, WARP

OUTSIDE = -1
_MMA = re.compile(r"^[HIQ]MMA\.(?:SP\.)?(16816|1688|1684|16832|16864)\b")
_WGMMA = re.compile(r"^[HIQ]GMMA\.(\d+)x(\d+)x(\d+)")
_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "16832": 16 * 8 * 32, "16864": 16 * 8 * 64}
_REGISTER = re.compile(r"\bR(\d+)\b")
_SPECIAL = ("MUFU",)
_MULTIPLY = ("FFMA", "FMUL", "FADD", "HADD2", "HMUL2", "HFMA2", "FSWZADD")
_INTEGER_MULTIPLY = ("IMAD", "IMUL", "IDP")
_ALU = (
    "IADD", "IADD3", "VIADD", "ISCADD", "LEA", "IABS", "IMNMX", "VIMNMX", "ISETP", "SEL", "LOP3", "PLOP3", "SHF",
    "PRMT", "MOV", "SGXT", "BMSK", "VOTE", "R2P", "P2R", "FLO", "POPC", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP",
    "HMNMX2", "HSETP2", "F2FP", "I2FP",
)  # fmt: skip
_CONVERT = ("F2F", "I2F", "F2I", "FRND")
_CROSSING = ("SHFL", "REDUX", "MOVM")


@dataclasses.dataclass(frozen=True)
class Facts:
    """One loop of one kernel, per warp and iteration; `loop` -1 is the code outside of loops, which runs once.

    Attributes:
        loop: number in code order.
        parent: the loop around it, -1 for none.
        issued: instructions.
        mma: multiply-adds of `mma.sync`; those of TF32 count twice, as they take twice the time.
        wgmma: multiply-adds of `wgmma`, this warp's quarter of its warp group.
        multiply: cycles of the fp32 pipe. alu: of the integer and comparison pipe. special: of the special functions.
        shared: cycles of the multiprocessor's shared memory, without bank conflicts.
        loads, stores: instructions on global memory, asynchronous copies among the loads.
        waits: loads whose result goes to a register: the program waits for memory.
        ahead: instructions between such a load and the first use of its result, the fewest of all loads; a use in the
            next iteration counts.
        load_bytes, store_bytes: of all lanes, hidden by masks or not.
        spills: loads and stores of local memory.
        barriers: of the whole program.
    """

    loop: int
    parent: int
    issued: int
    mma: int
    wgmma: int
    multiply: int
    alu: int
    special: int
    shared: int
    loads: int
    stores: int
    waits: int
    ahead: int
    load_bytes: int
    store_bytes: int
    spills: int
    barriers: int


def count(text: str) -> list[Facts]:
    """Facts of every loop in a listing of `nvdisasm`, the code outside of loops first: there, of alternatives, the
    longer one.
    """
    listing = sass.parse(text)
    parents = [OUTSIDE, *(loop.parent for loop in sass.loops(listing))]
    grouped: dict[int, list[sass.Instruction]] = collections.defaultdict(list)
    for instruction, owner, runs in zip(listing.instructions, sass.owners(listing), sass.busiest_path(listing)):
        if runs or owner != OUTSIDE:
            grouped[owner].append(instruction)
    return [_facts(number - 1, parent, grouped[number - 1]) for number, parent in enumerate(parents)]


def spills_in_loops(facts: Iterable[Facts]) -> int:
    """Local-memory instructions that run more than once."""
    return sum(one.spills for one in facts if one.loop != OUTSIDE)


def _facts(loop: int, parent: int, instructions: list[sass.Instruction]) -> Facts:
    total: dict[str, int] = collections.defaultdict(int)
    for instruction in instructions:
        if instruction.base != "NOP":
            total["issued"] += 1
            for name, amount in _costs(instruction).items():
                total[name] += amount
    total["ahead"] = _ahead(instructions, again=loop != OUTSIDE)
    names = [field.name for field in dataclasses.fields(Facts)][2:]
    return Facts(loop, parent, *(total[name] for name in names))


def _ahead(instructions: list[sass.Instruction], *, again: bool) -> int:
    """Fewest instructions from a load to the first mention of its registers; 0 without loads."""
    found: list[int] = []
    for index, load in enumerate(instructions):
        target = _REGISTER.match(load.operands)
        if load.base in ("LDG", "LD") and target:
            first = int(target.group(1))
            held = {str(register) for register in range(first, first + _words(load.opcode))}
            later = instructions[index + 1 :] + (instructions[:index] if again else [])
            uses = (n for n, other in enumerate(later) if held & set(_REGISTER.findall(other.operands)))
            found.append(next(uses, len(later)))
    return min(found, default=0)


def _words(opcode: str) -> int:
    """32-bit words per lane that a memory instruction moves, at least one."""
    return next((int(bits) // 32 for bits in ("64", "128") if f".{bits}" in opcode), 1)


def _costs(instruction: sass.Instruction) -> dict[str, int]:
    """Pipe cycles of one instruction of one warp. Half the lanes of a warp pass the integer pipe at once, an eighth the
    special functions (CUDA C++ Programming Guide, table of arithmetic throughput, compute capabilities 8.6 and 9.0).
    """
    base, opcode = instruction.base, instruction.opcode
    if base.endswith("MMA"):
        return _matrix(opcode)
    if base in _MULTIPLY:
        return {"multiply": 1}
    if base in _INTEGER_MULTIPLY:
        return {"multiply": 2}
    if base in _ALU:
        return {"alu": 2}
    if base in _SPECIAL or base in _CONVERT:
        return {"special": 8}
    if base in ("LDL", "STL"):
        return {"spills": 1}
    if base == "BAR":
        return {"barriers": 1}
    return _memory(base, opcode)


def _matrix(opcode: str) -> dict[str, int]:
    weight = 2 if "TF32" in opcode else 1
    small, large = _MMA.match(opcode), _WGMMA.match(opcode)
    if small:
        return {"mma": weight * _SHAPES[small.group(1)]}
    if large:
        rows, columns, depth = (int(size) for size in large.groups())
        return {"wgmma": weight * rows * columns * depth // QUARTERS}
    raise ValueError(f"matrix instruction of unknown shape: {opcode}")


def _memory(base: str, opcode: str) -> dict[str, int]:
    words = _words(opcode)
    size = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2}
    each = next((width for suffix, width in size.items() if suffix in opcode), 4 * words)
    if base in ("LDG", "LD"):
        return {"loads": 1, "waits": 1, "load_bytes": each * WARP, "shared": words}
    if base == "LDGSTS":
        return {"loads": 1, "load_bytes": each * WARP, "shared": words}
    if base in ("STG", "ST"):
        return {"stores": 1, "store_bytes": each * WARP, "shared": words}
    if base in ("LDSM", "STSM"):
        return {"shared": int(opcode[-1]) if opcode[-1] in "24" else 1}
    if base in ("LDS", "STS", "ATOMS"):
        return {"shared": words}
    return {"shared": 1} if base in _CROSSING else {}
