"""Every Triton kernel, compiled ahead of time for GPUs that need not be here, against limits and against the
checked-in tables.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from astrobiogen.testing import compile_gate
from astrobiogen.testing.compile_gate import Outcome, Row, Tables
from astrobiogen.testing.speed.machines import occupancy

TABLES = Path(__file__).parents[1] / "compile_gate"
UPDATE = "python -m astrobiogen.testing.compile_gate --update"


@pytest.mark.parametrize("op", compile_gate.ops_with_cases())
def test_kernels_pass_the_gate_and_equal_the_table(op: str) -> None:
    stored = Tables.load(TABLES, op)
    workers = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    outcomes = compile_gate.measure(op, workers=workers, known=stored)
    assert outcomes, f"{op}: compile_cases() is empty"
    found = [fault for outcome in outcomes for fault in compile_gate.faults(outcome)]
    assert not found, "\n".join(found)
    changed = compile_gate.differences([outcome.row for outcome in outcomes], stored.rows)
    assert not changed, "\n".join([*changed, f"if this is meant: {UPDATE} {op}"])
    lost = compile_gate.losses(outcomes, stored)
    assert not lost, "\n".join([*lost, f"if this is meant: {UPDATE} {op}"])


@pytest.fixture(scope="module")
def planted() -> dict[str, Outcome]:
    """Outcomes of `tests/compile_gate/planted.py` by case name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(TABLES / "planted.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    outcomes = [compile_gate.parse_outcome(json.loads(line)) for line in run.stdout.splitlines()]
    return {outcome.row.case: outcome for outcome in outcomes}


def test_planted_faults_are_found(planted: dict[str, Outcome]) -> None:
    def complaints(name: str) -> str:
        return "\n".join(compile_gate.faults(planted[name]))

    assert complaints("good") == ""
    assert planted["good"].row.loads_16 == 1
    assert "no 16-byte global load" in complaints("unaligned")
    assert "no 16-byte global load" in complaints("strided")
    assert "spill instructions in loops, allowed 0" in complaints("spilling")
    assert complaints("spilling once") == ""
    assert planted["spilling once"].row.spills > 0
    assert complaints("dot") == ""
    assert planted["dot"].row.mma >= 1
    assert "without tensor-core instructions" in complaints("no dot")
    assert "STRID" in complaints("misspelt")


def test_too_much_shared_memory_is_found() -> None:
    row = _row(shared=101_377)
    assert "allowed 101376" in compile_gate.faults(Outcome(row, False, False))[0]
    assert compile_gate.faults(Outcome(dataclasses.replace(row, target=90), False, False)) == []


def test_a_changed_table_is_found() -> None:
    row = _row()
    assert compile_gate.differences([row], [row]) == []
    assert "registers 40 -> 48" in compile_gate.differences([dataclasses.replace(row, registers=48)], [row])[0]
    assert "not in the table" in compile_gate.differences([row], [])[0]
    assert "not a case any more" in compile_gate.differences([], [row])[0]
    assert compile_gate.differences([dataclasses.replace(row, triton="9.9.9", registers=48)], [row]) == []


def test_a_table_survives_the_round_trip(tmp_path: Path) -> None:
    rows = [_row(), _row(target=90, occupancy=0.125)]
    compile_gate.save(tmp_path / "op.csv", rows)
    assert compile_gate.load(tmp_path / "op.csv") == rows
    assert compile_gate.load(tmp_path / "absent.csv") == []


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        (86, 4, 32, 0, 1.0),  # 48 warps: 12 blocks of 4
        (86, 8, 255, 0, 1 / 6),  # 8 warps x 8192 registers: one block of 8
        (86, 4, 128, 49_152, 1 / 6),  # 102400 / (49152 + 1024): two blocks of 4
        (90, 4, 168, 0, 3 / 16),  # 5376 registers per warp: 12 warps, three blocks of 4
    ],
)
def test_occupancy(target: int, warps: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(target, warps, registers, shared) == pytest.approx(expected, abs=6e-4)


def _row(target: int = 86, shared: int = 4096, occupancy: float = 0.5) -> Row:
    return Row("forward/4096/fp16", target, "3.7.1", 4, 40, shared, 0, 0, 0, 4, 1, occupancy, "0" * 16)
