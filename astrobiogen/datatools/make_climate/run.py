"""``python -m astrobiogen.data make-climate``: climates of catalogue planets by ExoPlaSim, several at a time."""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import math
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import rich.console
import rich.progress

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates.planets import CATALOGUE, read_catalogue
from astrobiogen.datatools.make_climate.driver import PREPARE
from astrobiogen.datatools.make_climate.jobs import MIN_SEGMENT_DAYS, Job, Segment, Settings, cause
from astrobiogen.datatools.make_climate.parameters import Climate, climate_of
from astrobiogen.datatools.make_climate.plot import Runs, history_of, plot_histories
from astrobiogen.datatools.progress import say
from astrobiogen.system import staging

# one core, T21L10, 45-minute steps: 215 s as ExoPlaSim is shipped (bounds checked), 186 s with -march=native
SECONDS_PER_YEAR = 200.0
MAX_EPOCHS = 10  # file names hold the epoch as one digit


def planned(catalogue: Path, names: Sequence[str], p_co2: Sequence[float]) -> list[Climate]:
    """One run per planet and CO2 pressure; the epochs of a planet are its pressures in the given order."""
    rows = read_catalogue(catalogue)
    if absent := [n for n in names if n not in rows]:
        like = difflib.get_close_matches(absent[0], rows, n=3)
        raise DataError(catalogue, absent[0], "no such planet" + (f"; similar: {', '.join(like)}" if like else ""))
    return [climate_of(catalogue, rows[name], k, p) for name in dict.fromkeys(names) for k, p in enumerate(p_co2)]


def prepare(python: str) -> str:
    """Make ExoPlaSim ready in the interpreter ``python``, compiling it at its first use; returns its version.

    Raises:
        DataError: The interpreter, the package, netCDF4 or the compilers are absent: names what, and how to install it.
    """
    say("making ExoPlaSim ready (the first use of an installation compiles it, about a minute)")
    with tempfile.TemporaryDirectory(prefix="exoplasim-") as folder:
        try:
            done = subprocess.run(
                [python, "-c", PREPARE, folder], capture_output=True, text=True, errors="replace", check=False,
                stdin=subprocess.DEVNULL, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            raise DataError(python, "--python", f"cannot be started ({error.strerror})") from error
    if done.returncode != 0:
        raise DataError(
            python,
            "exoplasim",
            f"is not ready there ({cause(done.stderr)}). It is an external program (GPL-2.0): in an environment of its "
            "own, with gfortran, g++ and make on the system, pip install 'numpy<2' 'setuptools<70' meson ninja netCDF4 "
            "exoplasim, and name that environment's interpreter with --python",
        )
    return done.stdout.strip().splitlines()[-1]


def table(runs: Sequence[Climate], settings: Settings) -> str:
    """What will be run, for ``--dry-run``."""
    lines = [f"{'climate':<40}{'flux W/m2':>10}{'star K':>8}{'radius':>8}{'g m/s2':>8}{'day d':>8}"]
    for run in runs:
        p = run.parameters
        lines.append(
            f"{run.key:<40}{p['flux']:>10.1f}{p['startemp']:>8.0f}{p['radius']:>8.2f}{p['gravity']:>8.2f}"
            f"{p['rotationperiod']:>8.2f}"
        )
    hours = len(runs) * settings.max_years * SECONDS_PER_YEAR / 3600.0
    lines.append(f"{len(runs)} climates, at most {settings.max_years:g} model years each: up to {hours:.1f} core hours")
    return "\n".join(lines)


class Board:
    """Where each climate stands: bars on a terminal, a line per segment elsewhere."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        self.bar: rich.progress.Progress | None = None
        self.tasks: dict[str, rich.progress.TaskID] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bars while inside."""
        console = rich.console.Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        columns = (
            rich.progress.TextColumn("{task.description:<36}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[state]}"),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as self.bar:
            yield
        self.bar = None

    def update(self, key: str, history: list[Segment]) -> None:
        """A segment of ``key`` ended (or was found on disk)."""
        years = len(history) * self.settings.segment_days / 360.0
        figures = f", TOA {history[-1].toa_imbalance:+.2f} W/m2, ts {history[-1].ts_mean:.2f} K" if history else ""
        state = f"{years:5.1f} years{figures}"
        with self.lock:
            if self.bar is None:
                say(f"{key}: {state.strip()}")
                return
            if key not in self.tasks:
                self.tasks[key] = self.bar.add_task(key, total=self.settings.max_segments, state=state)
            self.bar.update(self.tasks[key], completed=len(history), state=state)


@dataclass(frozen=True)
class Outcome:
    """What became of the runs, by key."""

    balanced: list[str]
    unconverged: list[str]
    failed: list[str]


def run_all(
    runs: Sequence[Climate], output: Path, work: Path, python: str, settings: Settings, jobs: int, version: str
) -> Outcome:
    """Run climates, ``jobs`` at a time, each on one core; a failed one does not stop the others.

    Raises:
        KeyboardInterrupt: After ending the running segments; everything finished stays, the same call continues.
    """
    board, stop, files = Board(settings), threading.Event(), threading.Lock()
    outcome = Outcome([], [], [])

    def one(run: Climate) -> bool:
        job = Job(run, work / run.key, python, settings, version, files)
        return job.run(output, stop, lambda history: board.update(run.key, history))

    with board.shown(), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, run): run for run in runs}
        try:
            for future in as_completed(futures):
                key = futures[future].key
                try:
                    (outcome.balanced if future.result() else outcome.unconverged).append(key)
                except DataError as error:
                    outcome.failed.append(f"{key}: {error}")
                    say(f"{key} failed: {error}")
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return outcome


def draw(runs: Sequence[Climate], work: Path, settings: Settings) -> None:
    """Plot the histories of ``runs`` into ``history.png`` in their work folder ``work``."""
    histories: Runs = {}
    for run in runs:
        with contextlib.suppress(DataError):  # a damaged folder has failed its run, which said so
            histories |= history_of(work / run.key)
    if histories:
        plot_histories(histories, work / "history.png", settings.max_imbalance)
        say(f"energy balance and temperature against model years: {work / 'history.png'}")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """What a batch system or a closed terminal sends ends the running segments as Ctrl-C does; they would go on alone.
    SIGHUP stays ignored where it was (``nohup``).
    """
    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {n: signal.signal(n, _interrupt) for n in wanted if n != signal.SIGHUP or not ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def name_planets(path: Path, runs: Sequence[Climate]) -> None:
    """Enter planets that ``build`` does not know into ``tables/planets.csv``; rows already there are kept."""
    new = {run.prefix: run.body for run in runs if run.prefix not in CATALOGUE}
    rows: dict[str, tuple[str, str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as handle:
            rows = {row["prefix"]: (row["name"], row["star_system"]) for row in csv.DictReader(handle)}
    if set(new) <= set(rows):
        return
    rows |= {prefix: (body.name, body.star_system) for prefix, body in new.items()}
    with staging.staged(path) as part, part.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("prefix", "name", "star_system"))
        writer.writerows((prefix, *values) for prefix, values in sorted(rows.items()))


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data make-climate",
        description="Run ExoPlaSim (an external program, GPL-2.0, not part of this package) for planets of the Open "
        "Exoplanet Catalogue until the energy balance closes. Interrupted or failed runs continue with the same "
        "command. Two segments per climate go to RAW/climate for 'build'.",
        epilog="Parameters follow one rule: see astrobiogen/datatools/make_climate/parameters.py and --dry-run.",
    )
    parser.add_argument("--raw", type=Path, required=True, help="raw folder: files go to RAW/climate")
    parser.add_argument("--planets", nargs="+", required=True, metavar="NAME", help='catalogue names, "TOI-700 d"')
    parser.add_argument("--catalogue", type=Path, help="default: RAW/tables/oec_planets.csv.gz")
    parser.add_argument(
        "--co2",
        nargs="+",
        type=float,
        default=[0.0004, 0.01, 0.1],
        metavar="BAR",
        help="CO2 pressures, one epoch each (default 0.0004 0.01 0.1)",
    )
    parser.add_argument("--work", type=Path, help="folder of unfinished runs (default: RAW/climate-work)")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has exoplasim (default: this one)")
    parser.add_argument("--jobs", type=int, default=1, help="climates at a time, one core each (default 1)")
    defaults = Settings()
    for name, what in (
        ("segment_days", "length of a segment, days"),
        ("max_years", "model years after which a run ends unconverged"),
        ("max_imbalance", "balanced: net radiation at the top at most this, W/m2"),
        ("max_drift", "balanced: change of the mean surface temperature over a year at most this, K"),
        ("timestep", "minutes"),
        ("mixed_layer", "depth of the slab ocean, metres"),
    ):
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, help=f"{what} (default {value:g})"
        )
    parser.add_argument("--dry-run", action="store_true", help="show parameters and cost, run nothing")
    options = parser.parse_args(arguments)
    for name in ("jobs", "segment_days", "max_years", "max_imbalance", "max_drift", "timestep", "mixed_layer"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(options, name)}, expected a positive number")
    if options.segment_days < MIN_SEGMENT_DAYS:
        parser.error(
            f"--segment-days: got {options.segment_days:g}, expected at least {MIN_SEGMENT_DAYS:g} (12 means of 5 days)"
        )
    if wrong := [p for p in options.co2 if not 0 < p < math.inf]:
        parser.error(f"--co2: got {wrong[0]}, expected positive pressures in bar")
    if len(options.co2) > MAX_EPOCHS:
        parser.error(f"--co2: got {len(options.co2)} pressures, expected at most {MAX_EPOCHS}: epochs are one digit")
    return options


def main(arguments: list[str]) -> int:
    """Command line of ``make-climate``; 0 all balanced, 1 some failed or unconverged."""
    options = _arguments(arguments)
    settings = Settings(
        options.segment_days,
        options.max_years,
        options.max_imbalance,
        options.max_drift,
        options.timestep,
        options.mixed_layer,
    )
    catalogue = options.catalogue or options.raw / "tables/oec_planets.csv.gz"
    runs = planned(catalogue, options.planets, options.co2)
    if options.dry_run:
        sys.stdout.write(table(runs, settings) + "\n")
        return 0
    version = prepare(options.python)
    output, work = options.raw / "climate", options.work or options.raw / "climate-work"
    name_planets(options.raw / "tables/planets.csv", runs)
    try:
        with _terminated_as_interrupted():
            outcome = run_all(runs, output, work, options.python, settings, options.jobs, version)
    finally:  # of an interrupted run too
        draw(runs, work, settings)
    for key in outcome.unconverged:
        sys.stdout.write(f"not balanced after {settings.max_years:g} years (written, marked): {key}\n")
    for line in outcome.failed:
        sys.stdout.write(f"failed: {line}\n")
    sys.stdout.write(
        f"{len(outcome.balanced)} balanced, {len(outcome.unconverged)} not balanced, {len(outcome.failed)} failed; "
        f"files in {output}\n"
    )
    return 0 if not outcome.unconverged and not outcome.failed else 1
