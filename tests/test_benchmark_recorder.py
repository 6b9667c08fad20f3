"""Every candidate that was timed in turns is an entry of pytest-benchmark."""

import types
from typing import Any

import torch

from benchmarks.harness import ONCE, Row, Work
from benchmarks.recorder import KEY, Recorder
from benchmarks.runner import Bench


def test_candidates_and_ceilings_are_entries_of_one_group() -> None:
    fixture: Any = types.SimpleNamespace(fullname="benchmarks/bench_double.py::test_double[8]", _mode=None)
    session: Any = types.SimpleNamespace(benchmarks=[])
    rows: list[Row] = []
    bench = Bench(torch.device("cpu"), True, rows, record=Recorder(fixture, session))
    bench.settings = ONCE
    bench(
        op="double", size="8", dtype=torch.float32, arguments={"x": torch.randn(8)}, differentiable=("x",),
        ours=lambda x: x + x, reference=lambda x: 2 * x, work=Work(64.0, 64.0),
    )  # fmt: skip
    assert fixture._mode, "pytest-benchmark would report a fixture that was not used"
    saved = [found.as_dict() for found in session.benchmarks]
    timed = [row for row in rows if row.status == "ok"]
    assert [entry["params"] for entry in saved] == [{name: getattr(row, name) for name in KEY} for row in timed]
    assert {entry["group"] for entry in saved} == {f"double 8 float32 {mode}" for mode in ("forward", "backward")}
    assert len({entry["fullname"] for entry in saved}) == len(saved) == 8  # ours, eager, copy and product, two modes
    for entry, row in zip(saved, timed):
        assert entry["fullname"].startswith("benchmarks/bench_double.py::double[8-float32-")
        assert entry["stats"]["median"] * 1e6 == row.median_us
        assert entry["extra_info"]["placements"] == row.placements
        assert all(value == value for value in entry["extra_info"].values()), "NaN is no JSON"
