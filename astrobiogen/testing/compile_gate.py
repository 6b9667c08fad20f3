"""The ahead-of-time compile gate: what the Triton kernels become on GPUs that this machine does not have.

Every `CompileCase` of an op is compiled for its targets (sm_86 is the RTX A5000, sm_90 the H100 and H200) and its
machine code is read with the `cuobjdump` and `nvdisasm` that ship inside the Triton package. A row fails for
register spills inside loops (one that runs once per program costs nothing that counts), for more shared memory than a
block may have, for a dot without tensor-core instructions, and for missing 16-byte global loads. The rows are checked
in as one CSV file per op; with the same Triton version every figure must be equal. Beside them lie what each loop does
(`loops/`) and the speed that follows from it (`predicted/`, written by `astrobiogen.testing.predict`): no predicted
share of peak may fall by more than 5 %.

    python -m astrobiogen.testing.compile_gate            # compile and compare
    python -m astrobiogen.testing.compile_gate --update   # write the tables anew
"""

import argparse
import dataclasses
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astrobiogen import kernels
from astrobiogen.testing.gate import tables
from astrobiogen.testing.speed.loops import Facts
from astrobiogen.testing.speed.machines import LIMITS, MACHINES
from astrobiogen.testing.speed.model import Prediction

TABLES = Path("tests/compile_gate")


# A change may not lose more than this share of a predicted share of peak.
TOLERATED_LOSS = 0.05


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
        loop_spills: those inside loops.
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
    loop_spills: int
    mma: int
    loads_16: int
    loads_narrow: int
    occupancy: float
    code: str


@dataclasses.dataclass(frozen=True)
class LoopRow(Facts):
    """What one loop does, with the digest of the code that has it."""

    code: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A compiled row with what the case demands of it, or the compiler's error. `loops` and `predicted` are there for
    the targets and specialisations that the speed model knows.
    """

    row: Row
    needs_mma: bool
    needs_vector_loads: bool
    error: str = ""
    loops: tuple[LoopRow, ...] = ()
    predicted: tuple[Prediction, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is checked in for one op."""

    rows: list[Row]
    loops: list[LoopRow]
    predicted: list[Prediction]

    @classmethod
    def load(cls, folder: Path, op: str) -> "Tables":
        """The three tables of an op; empty where a file does not exist."""
        return cls(
            load(folder / f"{op}.csv"),
            tables.load(folder / "loops" / f"{op}.csv", LoopRow),
            tables.load(folder / "predicted" / f"{op}.csv", Prediction),
        )


def parse_outcome(record: dict[str, Any]) -> Outcome:
    """An outcome from its JSON form."""
    return Outcome(
        Row(**record["row"]), record["needs_mma"], record["needs_vector_loads"], record["error"],
        tuple(LoopRow(**loop) for loop in record["loops"]),
        tuple(Prediction(**prediction) for prediction in record["predicted"]),
    )  # fmt: skip


def ops_with_cases() -> tuple[str, ...]:
    """Ops that have a `triton_kernels` module."""
    packages = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]
    return tuple(name for name in sorted(packages) if find_spec(f"{kernels.__name__}.{name}.triton_kernels"))


def measure(
    op: str, *, workers: int = 2, known: Tables | None = None, targets: Sequence[int] | None = None
) -> list[Outcome]:
    """Compile every case of `op` for its targets, in subprocesses without the Triton interpreter.

    Args:
        op: package name under `astrobiogen/kernels`.
        workers: processes.
        known: tables whose counts may be reused where the machine code is the same; disassembling takes longer than
            compiling.
        targets: only these compute capabilities; all of them by default.

    Raises:
        RuntimeError: a worker failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows, loops = (known.rows, known.loops) if known else ([], [])
    payload = json.dumps(
        {
            "rows": [dataclasses.asdict(row) for row in rows],
            "loops": [dataclasses.asdict(loop) for loop in loops],
            "targets": list(LIMITS if targets is None else targets),
        }
    )
    command = [sys.executable, "-m", "astrobiogen.testing.gate.worker", op, str(workers)]
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
        outcomes += [parse_outcome(json.loads(line)) for line in stdout.splitlines()]
    if failures:
        raise RuntimeError("\n".join(failures))
    return sorted(outcomes, key=lambda outcome: (outcome.row.case, outcome.row.target))


def faults(outcome: Outcome) -> list[str]:
    """What the gate holds against one row; empty if it passes."""
    row = outcome.row
    label = f"{row.case} sm_{row.target}"
    if outcome.error:
        return [f"{label}: does not compile: {outcome.error}"]
    found: list[str] = []
    if row.loop_spills:
        found.append(f"{label}: {row.loop_spills} spill instructions in loops, allowed 0 ({row.registers} registers)")
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


def losses(outcomes: Sequence[Outcome], stored: Tables) -> list[str]:
    """Where the predicted share of peak fell by more than `TOLERATED_LOSS`, or is not in the table, or is there alone.

    Outcomes of another Triton version than the table's are not compared.
    """
    versions = {(row.case, row.target): row.triton for row in stored.rows}
    measured = [outcome for outcome in outcomes if not outcome.error]
    known = [o for o in measured if versions.get((o.row.case, o.row.target), o.row.triton) == o.row.triton]
    table = {(row.case, row.size, row.device): row for row in stored.predicted}
    found: list[str] = []
    for row in (prediction for outcome in known for prediction in outcome.predicted):
        label, old = f"{row.case}, {row.size} on {row.device}", table.pop((row.case, row.size, row.device), None)
        if old is None:
            found.append(f"{label}: no predicted speed in the table")
        elif row.share < (1 - TOLERATED_LOSS) * old.share:
            found.append(f"{label}: predicted share of peak {old.share} -> {row.share}")
    devices = {MACHINES[o.row.target].name for o in measured if o.row.target in MACHINES}
    foreign = {o.row.case for o in measured if o not in known}
    return found + [
        f"{case}, {size} on {device}: predicted speed in the table, but no launch any more"
        for case, size, device in table
        if device in devices and case not in foreign
    ]


def load(path: Path) -> list[Row]:
    """Rows of a gate's table; none if the file does not exist."""
    return tables.load(path, Row)


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write a gate's table."""
    tables.save(path, Row, rows)


def save_speed(folder: Path, op: str, outcomes: Sequence[Outcome], stored: Tables) -> None:
    """Write the tables of loops and predicted speeds; rows of devices that were not compiled for are kept."""
    fresh = [prediction for outcome in outcomes for prediction in outcome.predicted]
    devices = {MACHINES[outcome.row.target].name for outcome in outcomes if outcome.row.target in MACHINES}
    fresh += [row for row in stored.predicted if row.device not in devices]
    tables.save(
        folder / "predicted" / f"{op}.csv", Prediction, sorted(fresh, key=lambda row: (row.device, row.case, row.size))
    )
    kept = {outcome.row.code for outcome in outcomes}
    targets = {outcome.row.target for outcome in outcomes}
    kept |= {row.code for row in stored.rows if row.target not in targets}
    loops = {(row.code, row.loop): row for row in stored.loops if row.code in kept}
    loops |= {(row.code, row.loop): row for outcome in outcomes for row in outcome.loops}
    tables.save(folder / "loops" / f"{op}.csv", LoopRow, [loops[key] for key in sorted(loops)])


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
        stored = Tables.load(options.tables, op)
        outcomes = measure(op, workers=options.workers, known=stored)
        rows = [outcome.row for outcome in outcomes if not outcome.error]
        found = [fault for outcome in outcomes for fault in faults(outcome)]
        if options.update:
            save(path, rows)
            save_speed(options.tables, op, outcomes, stored)
        else:
            found += differences(rows, stored.rows) + losses(outcomes, stored)
        complaints += [f"{op}: {line}" for line in found]
        sys.stdout.write(f"{op}: {len(rows)} rows, {len(found)} complaints\n")
    sys.stdout.write("".join(f"{line}\n" for line in complaints))
    return min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit(main())
