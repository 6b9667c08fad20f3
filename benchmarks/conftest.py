"""Options, the `bench` fixture, and the table at the end of `pytest benchmarks/`."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture

from astrobiogen.testing import inputs
from benchmarks import environment, results, runner, tuning
from benchmarks.graphs import side_stream
from benchmarks.harness import ONCE, Row, keep_freed_pages
from benchmarks.recorder import Recorder

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --save and --device."""
    group = parser.getgroup("astrobiogen benchmarks")
    group.addoption("--quick", action="store_true", help="first size of every benchmark, few repeats, no torch.compile")
    group.addoption("--save", action="store_true", help="write benchmarks/results/<device>/<op>.csv and .json")
    group.addoption("--results", type=Path, default=results.RESULTS, help="folder for --save (default: %(default)s)")
    group.addoption(
        "--set",
        action="append",
        default=[],
        metavar="OP.NAME=VALUE",
        help="give a named constant of an op another value, for tuning; repeatable: rms_norm.MOST_STEPS=64, or a tile, "
        "conv_nd.triton.launch.SMALL_SHARED.taps=128,128,64,8,3, attention.triton_config.TILES.86.80.forward=64,64,4,3",
    )
    group.addoption(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run (default: a GPU if present)"
    )
    group.addoption("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    group.addoption(
        "--fresh-pages",
        action="store_true",
        help="leave malloc as it is: every large result pays the page faults that a program outside a benchmark pays; "
        'the rows say "fresh" under "heap" and stand beside the "warm" ones',
    )
    group.addoption(
        "--cpu-level",
        choices=["baseline", "avx2", "avx512"],
        help="run our C++ kernels at a lower instruction-set level than the CPU has",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Threads, allocator, and where the rows are gathered."""
    config.stash[ROWS] = []
    torch.set_num_threads(config.getoption("--threads"))
    if not config.getoption("--fresh-pages"):
        keep_freed_pages()
    if config.getoption("--cpu-level"):
        set_cpu_level(config.getoption("--cpu-level"))
    # A backward is timed many times over one graph, which compiled code that reuses saved buffers refuses.
    torch._functorch.config.donated_buffer = False
    for setting in config.getoption("--set"):
        tuning.set_constant(setting)


def set_cpu_level(level: str) -> None:
    """Apply ``--cpu-level``; the result folder is named after it."""
    try:
        importlib.import_module("astrobiogen._C").set_cpu_level(level)
    except (ImportError, ValueError) as error:
        raise pytest.UsageError(f"--cpu-level {level}: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick keep the first parameter set of every benchmark function: sizes are listed smallest first."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Inductor and the peers warn about deprecations of their own; in the tests of our code a warning is an
            # error.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
    if not config.getoption("--quick"):
        return
    seen: set[str] = set()
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        name = item.nodeid.split("[", 1)[0]
        (dropped if name in seen else kept).append(item)
        seen.add(name)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device under test."""
    chosen = pytestconfig.getoption("--device")
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen)


@pytest.fixture
def quick(pytestconfig: pytest.Config) -> bool:
    """True under --quick."""
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture
def make(device: torch.device) -> Iterator[Any]:
    """`make(dtype)` gives a `TensorMaker` on the device, seeded alike for every benchmark."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield lambda dtype: inputs.maker(dtype, device, 0)


@pytest.fixture
def bench(
    pytestconfig: pytest.Config, benchmark: BenchmarkFixture, device: torch.device, quick: bool
) -> Iterator[runner.Bench]:
    """Measures all candidates of one op at one size; see `runner.Bench.__call__`. Its rounds are entries of
    pytest-benchmark; with --benchmark-disable all candidates are verified and run once. With --save rows are written as
    they come: a run that is ended by a time limit keeps what it has measured."""
    rows = pytestconfig.stash[ROWS]

    def keep() -> None:
        if pytestconfig.getoption("--save"):
            results.save(rows, _facts(pytestconfig), pytestconfig.getoption("--results"))

    record = Recorder(benchmark, pytestconfig.pluginmanager.get_plugin("pytest-benchmark"))
    made = runner.Bench(device, quick, rows, keep, record)
    if benchmark.disabled:
        made.settings = ONCE
    if pytestconfig.getoption("--fresh-pages"):
        made.settings = dataclasses.replace(made.settings, lead=1)
    with side_stream(device):
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One table per op and mode, and the files that were written."""
    rows = config.stash[ROWS]
    if not rows:
        return
    for (op, mode), group in results.grouped(rows).items():
        terminalreporter.section(f"{op}, {mode}")
        for line in results.table(group):
            terminalreporter.write_line(line)
    facts = _facts(config)
    terminalreporter.write_line(
        f"contention: a busy loop got {facts['core_share']:.0%} of a core at the end of the run"
    )
    if config.getoption("--save"):
        for path in results.save(rows, facts, config.getoption("--results")):
            terminalreporter.write_line(f"wrote {path}")


def _facts(config: pytest.Config) -> dict[str, Any]:
    """The environment, with the share of a core that is to be had now."""
    heap = "fresh" if config.getoption("--fresh-pages") else "warm"
    return environment.facts(_device_of(config)) | {"set": config.getoption("--set"), "heap": heap}


def _device_of(config: pytest.Config) -> torch.device:
    chosen = config.getoption("--device")
    return torch.device("cuda" if chosen != "cpu" and torch.cuda.is_available() else "cpu")
