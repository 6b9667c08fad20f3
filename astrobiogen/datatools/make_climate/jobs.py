"""One climate: segments until the energy balance closes, resumable after each."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import xarray as xr

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.climates import climate
from astrobiogen.datatools.make_climate.driver import SCRIPT
from astrobiogen.datatools.make_climate.parameters import Climate
from astrobiogen.system import staging
from astrobiogen.system.ownership import InUseError, Lock

YEAR = 360.0  # days of the model's year
KEPT = ("ta", "ua", "va", "hus", "cl", "ts", "tas", "ps", "sic", "pr", "evap", "clt", "prw", "alb", "rst", "rlut")
_POLL = 0.5  # seconds
MIN_SEGMENT_DAYS = 60.0  # ExoPlaSim writes 5-day means; with fewer than 12 it would fill the 12 times by interpolation
# what an exception of the program looks like in its log; the first of an attempt is the cause, the last only says that
# something was wrong
_EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """How long to run.

    Attributes:
        segment_days: Length of a segment; input and label are the last two.
        max_years: Model years after which a run ends unconverged.
        max_imbalance: W/m2; largest mean net radiation at the top of a balanced segment.
        max_drift: K; largest change of the mean surface temperature over the last year of a balanced run.
        timestep, mixed_layer: Minutes; metres of slab ocean.
    """

    segment_days: float = 180.0
    max_years: float = 40.0
    max_imbalance: float = 2.0
    max_drift: float = 0.1
    timestep: float = 45.0
    mixed_layer: float = 2.0

    @property
    def steps(self) -> int:
        """Time steps of a segment."""
        return round(self.segment_days * 1440.0 / self.timestep)

    @property
    def max_segments(self) -> int:
        """Segments until ``max_years``, at least two."""
        return max(2, int(self.max_years * YEAR / self.segment_days))


@dataclass(frozen=True)
class Segment:
    """Figures of a finished segment."""

    toa_imbalance: float  # W/m2
    ts_mean: float  # K


def drift(history: list[Segment], number: int, settings: Settings) -> float:
    """K per year; change of the mean surface temperature over the model year that ends with segment ``number``, NaN
    before the first year is over.

    Over a year, not from one segment to the next: those scatter by up to 0.5 K per year at balance (Kepler-1652 b), and
    a chance crossing of zero would pass for the end of a drift.
    """
    back = max(1, round(YEAR / settings.segment_days))
    if number < back:
        return math.nan
    change = history[number].ts_mean - history[number - back].ts_mean
    return change / back * YEAR / settings.segment_days


def balanced(history: list[Segment], settings: Settings) -> bool:
    """True when the last two segments are within the limit of the imbalance, and the last year within that of drift."""
    if len(history) < 2:
        return False
    worst = max(abs(segment.toa_imbalance) for segment in history[-2:])
    return worst <= settings.max_imbalance and abs(drift(history, len(history) - 1, settings)) <= settings.max_drift


def read_history(folder: Path) -> list[Segment]:
    """The finished segments of the climate whose work folder is ``folder``; empty when it was never begun."""
    path = folder / "history.json"
    if not path.exists():
        return []
    try:
        return [Segment(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(path, "", f"is no list of segments ({error}); remove the folder to start again") from error


def cause(log: str) -> str:
    """What the log of a failed attempt says went wrong: its first exception, else its last line."""
    found = _EXCEPTION.search(log)
    return found.group().strip() if found else (log.strip().splitlines() or ["no output"])[-1]


class Job:
    """One climate in ``folder``; ``run`` continues from what the folder holds.

    Args:
        planned: Planet and parameters.
        folder: Work folder of this climate: job.json, driver.py, history.json, restart files, the last two segments.
        python: Interpreter that can import exoplasim.
        settings: How long to run.
        version: Version of ExoPlaSim, for the files' provenance.
        files: Held while netCDF files are read or written: jobs in threads of one process must share it. The netCDF
            library keeps its state in the process without locking; two threads in it ended a real run with a
            segmentation fault.
    """

    def __init__(
        self,
        planned: Climate,
        folder: Path,
        python: str,
        settings: Settings,
        version: str,
        files: threading.Lock | None = None,
    ) -> None:
        self.planned, self.folder, self.python, self.settings = planned, folder, python, settings
        self.version, self._files = version, files or threading.Lock()
        self.history: list[Segment] = []

    def _prepare(self) -> None:
        """Write script and job; a folder of a run with other parameters is refused, not continued."""
        self.folder.mkdir(parents=True, exist_ok=True)
        job = {
            "name": self.planned.key,
            "parameters": self.planned.parameters,
            "timestep": self.settings.timestep,
            "steps": self.settings.steps,
            "mixed_layer": self.settings.mixed_layer,
        }
        path = self.folder / "job.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != job:
            raise DataError(path, "", "holds other parameters; remove the folder or choose another --work")
        path.write_text(json.dumps(job, indent=1), encoding="utf-8")
        (self.folder / "driver.py").write_text(SCRIPT, encoding="utf-8")
        self.history = read_history(self.folder)
        restart = f"restart-{len(self.history)}"
        if self.history and not (self.folder / restart).exists():
            raise DataError(self.folder, restart, "is missing; remove the folder to start again")

    def _segment(self, number: int, stop: threading.Event) -> None:
        """Run the external program for one segment; its whole process group ends with ``stop``."""
        log = self.folder / "log.txt"
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as handle:
            process = subprocess.Popen(
                [self.python, "driver.py", str(number)],
                cwd=self.folder,
                stdout=handle,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            while process.poll() is None:
                if stop.wait(_POLL):
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                    raise InterruptedError
        if process.returncode != 0:
            problem = cause(log.read_bytes()[before:].decode("utf-8", errors="replace"))
            raise DataError(log, f"segment {number}", f"ExoPlaSim ended with status {process.returncode}: {problem}")

    def _figures(self, number: int) -> Segment:
        """Energy balance and temperature of a segment, from its file."""
        path = self.folder / f"segment-{number}.nc"
        beside = path.with_name(path.name + ".json")
        beside.write_text(json.dumps(self.planned.parameters), encoding="utf-8")
        with self._files:
            found = climate.read_climate(path, ("ta", "hus", "ts", "sic"))
        return Segment(found.toa_imbalance, found.ts_mean)

    def run(self, output: Path, stop: threading.Event, report: Callable[[list[Segment]], None]) -> bool:
        """Run until balanced, then write ``<key>_seg1.nc`` and ``_seg2.nc`` into ``output``.

        Args:
            output: Folder of the two files.
            stop: When set, the running segment is ended and ``InterruptedError`` raised; the next ``run`` repeats it.
            report: Called with the history after each segment.

        Returns:
            True when balanced; False when ``max_years`` came first (the files are written, marked unconverged).

        Raises:
            DataError: The program failed or left an unusable file.
        """
        with self._alone():
            return self._run(output, stop, report)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The work folder for this process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(Lock(self.folder / ".lock"))
            except InUseError as error:
                raise DataError(self.folder, "", f"another process runs this climate ({error})") from error
            yield

    def _run(self, output: Path, stop: threading.Event, report: Callable[[list[Segment]], None]) -> bool:
        self._prepare()
        report(self.history)
        while not balanced(self.history, self.settings) and len(self.history) < self.settings.max_segments:
            number = len(self.history)
            if not (self.folder / f"segment-{number}.nc").exists():
                self._segment(number, stop)
            self.history.append(self._figures(number))
            with staging.staged(self.folder / "history.json") as part:
                part.write_text(json.dumps([asdict(s) for s in self.history]), encoding="utf-8")
            self._forget(number - 2)
            report(self.history)
        converged = balanced(self.history, self.settings)
        with self._files:
            for segment in (1, 2):
                self._publish(output, segment, len(self.history) - 3 + segment, converged)
        return converged

    def _forget(self, number: int) -> None:
        """Remove what no later step needs: restarts and segments before the last two."""
        for name in (f"segment-{number}.nc", f"segment-{number}.nc.json", f"restart-{number}"):
            (self.folder / name).unlink(missing_ok=True)

    def _publish(self, output: Path, segment: int, number: int, converged: bool) -> None:
        """Copy the kept variables with their provenance."""
        path = output / f"{self.planned.key}_seg{segment}.nc"
        years = (number + 1) * self.settings.segment_days / YEAR
        with xr.open_dataset(self.folder / f"segment-{number}.nc", decode_times=False, engine="netcdf4") as dataset:
            chosen = dataset[[name for name in KEPT if name in dataset]]
            chosen.attrs = {
                "title": f"{self.planned.key}, segment {segment}, after {years:.1f} model years",
                "source": f"ExoPlaSim {self.version}, T21L10 (external program), run by astrobiogen.data make-climate",
                "planet": self.planned.body.name,
                "parameters": json.dumps(self.planned.parameters),
                "converged": int(converged),
                "toa_imbalance": self.history[number].toa_imbalance,  # W/m2
                "ts_mean": self.history[number].ts_mean,  # K
                "ts_drift": drift(self.history, number, self.settings),  # K per year
                "acceptance": json.dumps(asdict(self.settings)),
            }
            with staging.staged(path) as part:
                chosen.to_netcdf(part, engine="netcdf4", encoding={n: {"zlib": True, "complevel": 4} for n in chosen})
