"""The fuzzer's figures, on the screen and in the reliability page."""

import datetime
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

COLUMNS = ("refused", "accepted", "wrong", "signal", "hang", "sanitizer", "elsewhere")
BEGIN, END = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
HEADER = (
    "| calls of | watched by | calls | refused | accepted | wrong | signals | hangs | sanitizer | on |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def table(counts: Mapping[str, Counter[str]]) -> str:
    """One aligned row per operator, and their sum."""
    total = Counter[str]()
    for row in counts.values():
        total.update(row)
    rows: list[tuple[str, ...]] = [("op", "calls", *COLUMNS)]
    for name, row in (*sorted(counts.items()), ("all", total)):
        rows.append((name, str(sum(row.values())), *(str(row[column]) for column in COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    )


def update(path: Path, library: str, sanitized: bool, seed: int, counts: Mapping[str, Counter[str]]) -> None:
    """Write this run's row into the table between the markers of `path`; other rows stay.

    Raises:
        ValueError: the page has no such table.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} must have the lines {BEGIN} and {END}, between which the figures go")
    before, rest = text.split(BEGIN, 1)
    inside, after = rest.split(END, 1)
    watch = "AddressSanitizer" if sanitized else "guard pages"
    total = Counter[str]()
    for row in counts.values():
        total.update(row)
    figures = [f"{total[column]:,}" for column in COLUMNS[:-1]]
    calls = sum(total.values()) - total["elsewhere"]
    versions = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    machine = f"{datetime.date.today():%d %b %Y}, {versions}, seed {seed}"
    new = f"| {len(counts)} {library} operators | {watch} | {calls:,} | " + " | ".join([*figures, machine]) + " |"
    key = re.compile(rf"\| \d+ {library} operators \| {watch} \|")
    rows = [
        line for line in inside.splitlines() if line.startswith("| ") and line[2:3].isdigit() and not key.match(line)
    ]
    path.write_text(f"{before}{BEGIN}\n\n{HEADER}" + "\n".join(sorted([*rows, new])) + f"\n\n{END}{after}")
