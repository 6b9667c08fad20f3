"""The ahead-of-time compile gate: what the Triton kernels become on GPUs that this machine does not have.

Every `CompileCase` of an op is compiled for its targets (sm_86 is the RTX A5000, sm_90 the H100 and H200) and its
machine code is read with the `cuobjdump` and `nvdisasm` that ship inside the Triton package. A row fails for
register spills, for more shared memory than a block may have, for a dot without tensor-core instructions, and for
missing 16-byte global loads. The rows are checked in as one CSV file per op; with the same Triton version every
figure must be equal.

    python -m astrobiogen.testing.compile_gate            # compile and compare
    python -m astrobiogen.testing.compile_gate --update   # write the tables anew
"""

import argparse
import csv
import dataclasses
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from astrobiogen import kernels

TABLES = Path("tests/compile_gate")


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


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel specialisation on one target.

    Attributes:
        case: name of the `CompileCase`.
        target: compute capability, e.g. 86.
        triton: version of the compiler.
        warps: warps per program.
        registers: per thread.
        shared: bytes of shared memory per program.
        spills: local-memory loads and stores in the machine code.
        mma: tensor-core instructions (HMMA, HGMMA, IMMA).
        loads_16: global loads of 16 bytes per thread (LDG.128, LDGSTS.128) and bulk tensor copies.
        loads_narrow: narrower global loads.
        occupancy: warps that fit on a multiprocessor, as a share of the most it can hold.
        code: first digits of the SHA-256 of the machine code; equal code has equal instruction counts.
    """

    case: str
    target: int
    triton: str
    warps: int
    registers: int
    shared: int
    spills: int
    mma: int
    loads_16: int
    loads_narrow: int
    occupancy: float
    code: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A compiled row with what the case demands of it, or the compiler's error."""

    row: Row
    needs_mma: bool
    needs_vector_loads: bool
    error: str = ""


def ops_with_cases() -> tuple[str, ...]:
    """Ops that have a `triton_kernels` module."""
    packages = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    return tuple(name for name in sorted(packages) if find_spec(f"{kernels.__name__}.{name}.triton_kernels"))


def measure(op: str, *, workers: int = 2, known: Sequence[Row] = ()) -> list[Outcome]:
    """Compile every case of `op` for every target, in subprocesses without the Triton interpreter.

    Args:
        op: package name under `astrobiogen/kernels`.
        workers: processes.
        known: rows whose instruction counts may be reused where the machine code is the same; disassembling takes
            longer than compiling.

    Raises:
        RuntimeError: a worker failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    payload = json.dumps([dataclasses.asdict(row) for row in known])
    command = [sys.executable, "-m", "astrobiogen.testing._compile_worker", op, str(workers)]
    processes = [
        subprocess.Popen(
            [*command, str(index)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(workers)
    ]
    outcomes: list[Outcome] = []
    failures: list[str] = []
    for process in processes:
        stdout, stderr = process.communicate(payload)
        if process.returncode != 0:
            failures.append(f"compile worker for {op} ended with {process.returncode}:\n{stderr}")
            continue
        for line in stdout.splitlines():
            record = json.loads(line)
            outcomes.append(Outcome(Row(**record.pop("row")), **record))
    if failures:
        raise RuntimeError("\n".join(failures))
    return sorted(outcomes, key=lambda outcome: (outcome.row.case, outcome.row.target))


def occupancy(target: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that programs of this size can fill."""
    limits = LIMITS[target]
    per_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        REGISTERS_PER_SM // per_warp // warps,
        limits.shared_per_sm // (shared + RESERVED_SHARED),
    )
    return round(blocks * warps / limits.warps, 3)


def faults(outcome: Outcome) -> list[str]:
    """What the gate holds against one row; empty if it passes."""
    row = outcome.row
    label = f"{row.case} sm_{row.target}"
    if outcome.error:
        return [f"{label}: does not compile: {outcome.error}"]
    found: list[str] = []
    if row.spills:
        found.append(f"{label}: {row.spills} spill instructions, allowed 0 ({row.registers} registers)")
    limit = LIMITS[row.target].shared_per_block
    if row.shared > limit:
        found.append(f"{label}: {row.shared} bytes of shared memory, allowed {limit}")
    if outcome.needs_mma and not row.mma:
        found.append(f"{label}: a dot without tensor-core instructions")
    if outcome.needs_vector_loads and not row.loads_16:
        found.append(f"{label}: no 16-byte global load ({row.loads_narrow} narrower ones)")
    return found


def differences(measured: Sequence[Row], stored: Sequence[Row]) -> list[str]:
    """Where the compiled rows and the checked-in table disagree.

    Rows compiled by another Triton version than the table's are not compared: a compiler may choose other registers.
    The machine code's digest is left out too: it changes with every edit, while what matters is in the other columns.
    """
    table = {(row.case, row.target): row for row in stored}
    found: list[str] = []
    for row in measured:
        old = table.pop((row.case, row.target), None)
        if old is None:
            found.append(f"{row.case} sm_{row.target}: not in the table")
        elif old.triton == row.triton:
            before, after = dataclasses.asdict(old), dataclasses.asdict(row)
            changed = [f"{k} {before[k]} -> {after[k]}" for k in before if k != "code" and before[k] != after[k]]
            if changed:
                found.append(f"{row.case} sm_{row.target}: {', '.join(changed)}")
    return found + [f"{case} sm_{target}: in the table, but not a case any more" for case, target in table]


def load(path: Path) -> list[Row]:
    """Rows of a table; none if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def _parse(line: dict[str, str]) -> Row:
    texts, shares = ("case", "triton", "code"), ("occupancy",)
    values = {name: float(text) if name in shares else int(text) for name, text in line.items() if name not in texts}
    return Row(**{name: line[name] for name in texts}, **values)  # pyright: ignore[reportArgumentType]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the number of faults and differences."""
    parser = argparse.ArgumentParser(prog="python -m astrobiogen.testing.compile_gate", description=__doc__)
    parser.add_argument("ops", nargs="*", help="ops to compile; all of them if none is named")
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    complaints: list[str] = []
    for op in options.ops or ops_with_cases():
        path = options.tables / f"{op}.csv"
        stored = load(path)
        outcomes = measure(op, workers=options.workers, known=stored)
        rows = [outcome.row for outcome in outcomes if not outcome.error]
        found = [fault for outcome in outcomes for fault in faults(outcome)]
        if options.update:
            save(path, rows)
        else:
            found += differences(rows, stored)
        complaints += [f"{op}: {line}" for line in found]
        sys.stdout.write(f"{op}: {len(rows)} rows, {len(found)} complaints\n")
    sys.stdout.write("".join(f"{line}\n" for line in complaints))
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
