"""Options, the `bench` fixture, and the table at the end of `pytest benchmarks/`."""

import csv
import dataclasses
import importlib
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._functorch.config

from astrobiogen.testing import inputs
from benchmarks import environment, runner
from benchmarks.graphs import side_stream
from benchmarks.harness import Row, keep_freed_pages

RESULTS = Path(__file__).parent / "results"
# What a run adds to each of its rows.
STAMP = ("commit", "date", "device", "torch", "triton", "threads", "heap", "core_share")
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --save and --device."""
    group = parser.getgroup("astrobiogen benchmarks")
    group.addoption("--quick", action="store_true", help="first size of every benchmark, few repeats, no torch.compile")
    group.addoption("--save", action="store_true", help="write benchmarks/results/<device>/<op>.csv and .json")
    group.addoption("--results", type=Path, default=RESULTS, help="folder for --save (default: %(default)s)")
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
        set_constant(setting)


def set_cpu_level(level: str) -> None:
    """Apply ``--cpu-level``; the result folder is named after it."""
    try:
        importlib.import_module("astrobiogen._C").set_cpu_level(level)
    except (ImportError, ValueError) as error:
        raise pytest.UsageError(f"--cpu-level {level}: {error}") from error


def set_constant(setting: str) -> None:
    """Apply one ``--set OP.NAME=VALUE`` or ``--set OP.MODULE.NAME.KEY...=VALUE``; refuses a constant that does not
    exist, so that no sweep times the same thing twice.
    """
    target, _, text = setting.partition("=")
    module, path = home_of(target)
    name, *steps = path or [""]
    try:
        values = [int(part) for part in text.split(",")]
        changed = replaced(getattr(module, name), steps, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise pytest.UsageError(f"--set {setting}: {module.__name__} has no such constant ({error!r})") from error
    setattr(module, name, changed)


def home_of(target: str) -> tuple[ModuleType, list[str]]:
    """The module that OP.MODULE... names (`triton_kernels` if it names none), and what follows it."""
    op, *path = target.split(".")
    package = importlib.import_module(f"astrobiogen.kernels.{op}")
    module = package
    while len(path) > 1 and hasattr(module, "__path__"):
        inner = f"{module.__name__}.{path[0]}"
        if importlib.util.find_spec(inner) is None:
            break
        module = importlib.import_module(inner)
        path.pop(0)
    if module is package:
        module = importlib.import_module(f"{package.__name__}.triton_kernels")
    return module, path


def replaced(value: Any, steps: Sequence[str], new: Sequence[int]) -> Any:
    """`value` with what lies at `steps` set to `new`: keys of a dict, first elements of the pairs of a tuple, fields of
    a dataclass. An integer takes one number, a dataclass its first fields.

    Raises:
        KeyError, AttributeError, TypeError: nothing lies there, or it is of another kind.
    """
    if steps:
        step, *rest = steps
        if isinstance(value, dict):
            key = next((key for key in value if str(key) == step), step)
            return {**value, key: replaced(value[key], rest, new)}
        if isinstance(value, tuple):
            if step not in {str(key) for key, _ in value}:
                raise KeyError(step)
            return tuple((key, replaced(one, rest, new) if str(key) == step else one) for key, one in value)
        return dataclasses.replace(value, **{step: replaced(getattr(value, step), rest, new)})
    if isinstance(value, int):
        (number,) = new
        return number
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **dict(zip(names, new, strict=False)))


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
def bench(pytestconfig: pytest.Config, device: torch.device, quick: bool) -> Iterator[runner.Bench]:
    """Measures all candidates of one op at one size; see `runner.Bench.__call__`. With --save rows are written as they
    come: a run that is ended by a time limit keeps what it has measured."""
    rows = pytestconfig.stash[ROWS]

    def keep() -> None:
        if pytestconfig.getoption("--save"):
            save(rows, _facts(pytestconfig), pytestconfig.getoption("--results"))

    made = runner.Bench(device, quick, rows, keep)
    if pytestconfig.getoption("--fresh-pages"):
        made.settings = dataclasses.replace(made.settings, lead=1)
    with side_stream(device):
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One table per op and mode, and the files that were written."""
    rows = config.stash[ROWS]
    if not rows:
        return
    for (op, mode), group in _grouped(rows).items():
        terminalreporter.section(f"{op}, {mode}")
        for line in table(group):
            terminalreporter.write_line(line)
    facts = _facts(config)
    terminalreporter.write_line(
        f"contention: a busy loop got {facts['core_share']:.0%} of a core at the end of the run"
    )
    if config.getoption("--save"):
        for path in save(rows, facts, config.getoption("--results")):
            terminalreporter.write_line(f"wrote {path}")


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
    cells = [head]
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


def _facts(config: pytest.Config) -> dict[str, Any]:
    """The environment, with the share of a core that is to be had now."""
    heap = "fresh" if config.getoption("--fresh-pages") else "warm"
    return environment.facts(_device_of(config)) | {"set": config.getoption("--set"), "heap": heap}


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.mode].append(row)
    return groups


def _device_of(config: pytest.Config) -> torch.device:
    chosen = config.getoption("--device")
    return torch.device("cuda" if chosen != "cpu" and torch.cuda.is_available() else "cpu")


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
