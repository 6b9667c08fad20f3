"""Compiles one share of an op's cases and prints a JSON line per row; run by `astrobiogen.testing.compile_gate`."""

import dataclasses
import hashlib
import importlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.testing.compile_gate import LoopRow, Outcome, Row
from astrobiogen.testing.speed import loops, model
from astrobiogen.testing.speed.machines import MACHINES, occupancy
from astrobiogen.testing.speed.work import works

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTS = ("spills", "loop_spills", "mma", "loads_16", "loads_narrow")
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


@dataclasses.dataclass(frozen=True)
class Known:
    """What has been read from machine code already, by its digest: instruction counts, and what loops do."""

    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    loops: dict[str, list[LoopRow]] = dataclasses.field(default_factory=dict)


def compile_case(case: CompileCase, target: int, known: Known, op: str = "") -> Outcome:
    """Compile one specialisation and read its machine code.

    Args:
        case: what to compile.
        target: compute capability.
        known: what need not be read again; new code is added.
        op: whose kernel it is; the speed of a kernel that belongs to none is not predicted.
    """
    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) ^ set(names)
    blank = Row(case.name, target, triton.__version__, case.num_warps, 0, 0, 0, 0, 0, 0, 0, 0.0, "")
    if unknown:
        return Outcome(
            blank, False, False, f"signature and constexprs do not fit the kernel's arguments: {sorted(unknown)}"
        )
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    fixed = {p.name for p in case.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    aligned = [name for name in case.aligned if name not in fixed]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        return Outcome(blank, case.needs_mma, case.needs_vector_loads, f"{type(error).__name__}: {error}")
    work = works(op, case, MACHINES[target]) if op and target in MACHINES else []
    registers, code = _read(compiled.asm["cubin"], known, need_loops=bool(work))
    shared = int(compiled.metadata.shared)
    filled = occupancy(target, case.num_warps, registers, shared)
    counts = known.counts[code]
    row = dataclasses.replace(blank, registers=registers, shared=shared, occupancy=filled, code=code, **counts)
    rows = tuple(known.loops[code]) if work else ()
    kernel = model.Kernel(case.num_warps, registers, shared, rows)
    predicted = tuple(model.predict(case.name, kernel, one, MACHINES[target]) for one in work)
    return Outcome(row, case.needs_mma, case.needs_vector_loads, "", rows, predicted)


def _read(cubin: bytes, known: Known, *, need_loops: bool) -> tuple[int, str]:
    """(registers, digest) of a binary, whose code is disassembled into `known` if it is new there."""
    code = hashlib.sha256(machine_code(cubin)).hexdigest()[:16]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers = int(re.findall(r"REG:(\d+)", run_tool("cuobjdump", "--dump-resource-usage", file.name))[-1])
        if code not in known.counts or (need_loops and code not in known.loops):
            listing = run_tool("nvdisasm", "-c", "-ndf", file.name)
            facts = loops.count(listing)
            known.counts[code] = count_instructions(listing) | {"loop_spills": loops.spills_in_loops(facts)}
            known.loops[code] = [LoopRow(**dataclasses.asdict(one), code=code) for one in facts]
    return registers, code


def machine_code(cubin: bytes) -> bytes:
    """The contents of the ELF file's `.text` sections; the rest has line numbers and paths."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + index * size) for index in range(count)]
    names = headers[names_index][4]
    code = b""
    for name, _, _, _, start, length in headers:
        if cubin[names + name :].startswith(b".text"):
            code += cubin[start : start + length]
    return code


def run_tool(tool: str, *arguments: str) -> str:
    """Output of one of the binary tools inside the Triton package."""
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def count_instructions(assembly: str) -> dict[str, int]:
    """Spills, tensor-core instructions and global loads in a listing of `nvdisasm`."""
    opcodes = OPCODE.findall(assembly)
    loads = [opcode for opcode in opcodes if opcode.startswith(("LDG.", "LDGSTS.", "UTMALDG", "UBLKCP"))]
    wide = [opcode for opcode in loads if ".128" in opcode or opcode.startswith(("UTMALDG", "UBLKCP"))]
    return {
        "spills": sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        "mma": sum(opcode.split(".")[0] in ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA") for opcode in opcodes),
        "loads_16": len(wide),
        "loads_narrow": len(loads) - len(wide),
    }


def main() -> None:
    """Arguments: op, number of workers, own index; known tables and the targets as JSON on standard input."""
    op, workers, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stored: dict[str, Any] = json.load(sys.stdin)
    known = Known({row["code"]: {name: row[name] for name in COUNTS} for row in stored["rows"]})
    for loop in stored["loops"]:
        known.loops.setdefault(loop["code"], []).append(LoopRow(**loop))
    module = importlib.import_module(f"astrobiogen.kernels.{op}.triton_kernels")
    targets = set(stored["targets"])
    jobs = [(case, target) for case in module.compile_cases() for target in case.targets if target in targets]
    for case, target in jobs[index::workers]:
        outcome = compile_case(case, target, known, op)
        sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


if __name__ == "__main__":
    main()
