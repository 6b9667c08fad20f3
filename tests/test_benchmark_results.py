"""What `pytest benchmarks/ --save` writes: a run of some sizes, threads or state of the heap keeps the rows of the
others, in CSV and JSON alike."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Row
from benchmarks.results import row_key, save

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FACTS: dict[str, Any] = {
    "device_slug": "cpu",
    "commit": "0123456",
    "device": "CPU",
    "torch": "2",
    "triton": "3",
    "threads": 1,
    "heap": "warm",
    "core_share": 1.0,
}


def row(size: str, median_us: float) -> Row:
    """A row of an op named "op", with the fields that a reader needs."""
    blank = {field.name: 0 for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING}
    known = {"op": "op", "size": size, "dtype": "float32", "mode": "forward", "candidate": "ours", "status": "ok"}
    return Row(**(blank | known | {"median_us": median_us}))  # type: ignore[arg-type]


def read(folder: Path, op: str) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Rows of the CSV file and of the JSON file."""
    with (folder / f"{op}.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / f"{op}.json").read_text())["rows"]


def test_a_run_of_one_size_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    save([row("small", 1.0), row("large", 2.0)], FACTS | {"date": "first"}, tmp_path)
    save([row("large", 3.0)], FACTS | {"date": "second"}, tmp_path)
    for rows in read(tmp_path / "cpu", "op"):
        found = {(line["size"], float(line["median_us"]), line["date"]) for line in rows}
        assert found == {("small", 1.0, "first"), ("large", 3.0, "second")}


@pytest.mark.parametrize("other", [{"heap": "fresh"}, {"threads": 2}], ids=str)
def test_rows_of_another_state_stand_beside(tmp_path: Path, other: dict[str, Any]) -> None:
    for facts, median in ((FACTS, 1.0), (FACTS | other, 2.0), (FACTS | other, 3.0)):
        save([row("small", median)], facts | {"date": "today"}, tmp_path)
    for rows in read(tmp_path / "cpu", "op"):
        assert [float(line["median_us"]) for line in rows] == [1.0, 3.0]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.csv")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_checked_in_files_hold_the_same_rows(path: Path) -> None:
    lines, records = read(path.parent, path.stem)
    keys = [sorted(row_key(line) for line in rows) for rows in (lines, records)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0]) > 0
