"""Rows of a run as a table on the terminal, and as files that keep the rows of other runs."""

import csv
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row

RESULTS = Path(__file__).parent / "results"
# What a run adds to each of its rows.
STAMP = ("commit", "date", "device", "torch", "triton", "threads", "heap", "core_share")


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by op and mode."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.mode].append(row)
    return groups


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines of one op and mode."""
    head = (
        "size",
        "dtype",
        "candidate",
        "median us",
        "20%..80%",
        "device us",
        "x eager",
        "(device)",
        "copy",
        "mm",
        "MiB",
        "error",
    )
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        if row.status != "ok":
            cells.append((row.size, row.dtype, row.candidate, row.status, *[""] * 8))
            continue
        cells.append((
            row.size, row.dtype, row.candidate, _number(row.median_us), f"{row.low_us:.1f}..{row.high_us:.1f}",
            _number(row.device_us), _number(row.against_eager, 2), _number(row.device_against_eager, 2),
            _percent(row.share_of_copy) + _range(row),
            _percent(row.share_of_mm), _number(row.added_mib, 2), "" if math.isnan(row.error) else f"{row.error:.1e}",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in cells if i != 3 or line[4]) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]


def save(rows: Sequence[Row], facts: dict[str, Any], results: Path) -> list[Path]:
    """Write CSV and JSON per op: this run's rows over older ones of the same key; JSON adds this run's environment."""
    folder = results / facts["device_slug"]
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {name: str(facts[name]) for name in STAMP}
    fields = [field.name for field in dataclasses.fields(Row)] + list(stamp)
    written: list[Path] = []
    for op in dict.fromkeys(row.op for row in rows):
        new = [{k: _plain(v) for k, v in dataclasses.asdict(row).items()} | stamp for row in rows if row.op == op]
        path = folder / f"{op}.csv"
        keys = {row_key(line) for line in new}  # rows of another thread count or heap stay
        old: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                old = [line for line in csv.DictReader(file) if row_key(line) not in keys]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*old, *new])
        record = folder / f"{op}.json"
        kept = json.loads(record.read_text())["rows"] if record.exists() else []
        kept = [line for line in kept if row_key(line) not in keys]
        record.write_text(json.dumps({"environment": facts, "rows": [*kept, *new]}, indent=1) + "\n")
        written += [path, record]
    return written


def row_key(line: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row another one; rows from before there was a column "heap" are "warm"."""
    named = tuple(str(line[name]) for name in ("op", "size", "dtype", "mode", "candidate", "threads"))
    return (*named, line.get("heap") or "warm")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else float(f"{value:.5g}")
    return value


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def _range(row: Row) -> str:
    """Of the share of a copy, over placements."""
    return f" {row.share_low:.0%}..{row.share_high:.0%}" if row.placements > 1 and row.share_low > 0 else ""


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"
