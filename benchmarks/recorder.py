"""Hands rounds that were timed in turns to pytest-benchmark, so that its options serve them: `--benchmark-json`,
`--benchmark-autosave`, `--benchmark-compare`, `--benchmark-histogram`, `--benchmark-group-by`.

pytest-benchmark's fixture times one function per test, on its own. A benchmark here times all candidates of a problem
round after round, so each candidate becomes an entry of its own, and one problem in one mode becomes a group.
"""

import dataclasses
import math
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.session import BenchmarkSession
from pytest_benchmark.stats import Metadata

from benchmarks.harness import Row, Samples

# What tells one entry from another; the other fields of a row are its `extra_info`.
KEY = ("op", "size", "dtype", "mode", "candidate")


@dataclasses.dataclass
class Entry:
    """What `Metadata` asks of the fixture whose rounds it holds."""

    name: str
    fullname: str
    group: str
    param: str
    params: dict[str, str]
    extra_info: dict[str, Any]
    cprofile_stats: None = None
    has_error: bool = False


class Recorder:
    """Adds the rounds of one test's candidates to the session of pytest-benchmark."""

    def __init__(self, fixture: BenchmarkFixture, session: BenchmarkSession) -> None:
        """`fixture` is the test's own: by it, --benchmark-skip and --benchmark-only know a benchmark."""
        self.file = fixture.fullname.split("::", 1)[0]
        self.session = session
        fixture._mode = "rounds in turns"  # else it reports that it was not used

    def __call__(self, row: Row, sample: Samples) -> None:
        """Add the wall times of `row`."""
        named = entry(row, self.file)
        found = Metadata(named, iterations=1, options={"timer": "rounds in turns", "disable_gc": True})
        for seconds in sample.wall:
            found.update(seconds)
        self.session.benchmarks.append(found)


def entry(row: Row, file: str) -> Entry:
    """The names under which pytest-benchmark shows, saves and compares a row."""
    fields = dataclasses.asdict(row)
    params = {name: str(fields.pop(name)) for name in KEY}
    known = {name: value for name, value in fields.items() if not (isinstance(value, float) and math.isnan(value))}
    param = "-".join(params[name] for name in KEY[1:])
    name = f"{row.op}[{param}]"
    return Entry(name, f"{file}::{name}", " ".join(params[name] for name in KEY[:4]), param, params, known)
