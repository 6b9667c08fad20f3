"""What a run tells: log.jsonl (a record of each step and event), train.log, the console, and optional trackers."""

import contextlib
import json
import logging
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import rich.console
import rich.logging
import rich.progress

from astrobiogen.training.config import MonitorConfig
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe import log_file, trackers
from astrobiogen.training.observe.records import Rotation, read_log, torn

__all__ = ["LOG_NAME", "Monitor", "read_log"]
LOG_NAME = "astrobiogen"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings, which strict JSON readers accept."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class _Records:
    """log.jsonl: each record reaches the operating system at once. On a full disk records are lost, not the run: it is
    said once, and a record "log_gap" with their number follows as soon as there is room.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._rotation = Rotation(path)
            file = path.open("ab", buffering=0)
            self._lines = log_file.Appender(file, "log.jsonl", logging.getLogger(LOG_NAME), torn=torn(path))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}", exit_code=1) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.file.close()
        self._rotation.close()

    @property
    def lost(self) -> int:
        """Records that could not be written."""
        return self._lines.lost

    def append(self, record: dict[str, Any]) -> None:
        """Write `record`, or count it as lost."""

        def gap(missing: int) -> str:
            return json.dumps({"event": "log_gap", "step": record.get("step", 0), "lost": missing})

        written = self._lines.append(json.dumps(record), gap)
        if written:
            self._lines.file = self._rotation.after(self._lines.file, written)


class Monitor:
    """Writes records and progress of one run; a context manager.

    Args:
        folder: the run folder; log.jsonl and train.log there are appended to.
        config: what to show.
        settings: the run's configuration, for the trackers' records.
    """

    def __init__(self, folder: Path, config: MonitorConfig, settings: dict[str, Any] | None = None) -> None:
        self._config = config
        self._folder = folder
        self.logger = logging.getLogger(LOG_NAME)
        self.rich = config.progress == "rich" or (config.progress == "auto" and sys.stderr.isatty())
        self._console = rich.console.Console(stderr=True)
        self._stack = contextlib.ExitStack()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._settings = settings or {}
        self._trackers = trackers.Trackers({})
        self._lock = threading.Lock()
        self._step = 0

    def __enter__(self) -> Self:
        with self._stack:
            self._open()
            self._stack = self._stack.pop_all()  # closed here only if something above has failed
        return self

    def _open(self) -> None:
        self._records = self._stack.enter_context(_Records(self._folder / "log.jsonl"))
        self._file = file = self._log_file()
        file.setFormatter(logging.Formatter(_FORMAT))
        console: logging.Handler
        if self.rich:
            console = rich.logging.RichHandler(console=self._console, show_path=False)
        else:
            console = logging.StreamHandler(sys.stderr)
            console.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        for handler in (file, console):
            self.logger.addHandler(handler)
            self._stack.callback(handler.close)
            self._stack.callback(self.logger.removeHandler, handler)
        self._stack.callback(self.logger.setLevel, self.logger.level)
        self.logger.setLevel(self._config.level)
        self._trackers = trackers.Trackers(trackers.open_trackers(self._folder, self._config, self._settings))
        self._stack.callback(self._trackers.close)

    def _log_file(self) -> log_file.LogFile:
        path = Path(self._config.log_file) if self._config.log_file else self._folder / "train.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return log_file.LogFile(path, self.logger)
        except OSError as error:
            raise UserError(f"monitor.log_file: {path} cannot be written: {error.strerror or error}") from error

    def __exit__(self, *_: object) -> None:
        self.end_progress()
        self._stack.close()

    @property
    def lost(self) -> dict[str, int]:
        """How many records and lines a full disk kept from the log files, for metrics.json."""
        return {"log_records_lost": self._records.lost, "log_lines_lost": self._file.lost}

    def record(self, event: str, **values: Any) -> None:
        """Append one record to log.jsonl and flush it to the operating system."""
        record = _finite({"event": event, "time": round(time.time(), 3), **values})
        with self._lock:  # the GPU statistics come from a thread of their own
            self._step = values.get("step", self._step)
            self._records.append(record)
            self._trackers.log(event, values)

    def record_gpu(self, cards: dict[str, dict[str, float]]) -> None:
        """Readings of the GPUs, filed under the step that was recorded last."""
        self.record("gpu", step=self._step, cards=cards)

    def begin_progress(self, total: int, done: int) -> None:
        """Start the progress bar over all micro-batches of the run."""
        if not self.rich:
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=total, completed=done)

    def advance(self, done: int, text: str) -> None:
        """Move the progress bar to `done` micro-batches."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=text)

    def end_progress(self) -> None:
        """Take the progress bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
