"""Optional trackers: TensorBoard events, Weights & Biases, trackio. log.jsonl stays the record, these are copies."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from astrobiogen.training.config import MonitorConfig
from astrobiogen.training.errors import UserError

_LOG = logging.getLogger("astrobiogen")


class Tracker(Protocol):
    """What a tracker must do."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take in numbers by name for micro-batch `step`."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


# Key of the configuration -> module, and the extra of this distribution that brings it.
_LIBRARIES = {
    "tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb", "wandb"), "trackio": ("trackio", "trackio"),
}  # fmt: skip


def _library(key: str) -> ModuleType:
    """Import the library of one tracker.

    Raises:
        UserError: it is not installed; names the key that asked for it and the extra that brings it.
    """
    module, extra = _LIBRARIES[key]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"monitor.{key}: needs {module}: pip install 'astrobiogen[{extra}]'; the import said: {error}"
        ) from error


class TensorBoard:
    """Event files in `<run>/tensorboard`, appended to by a resumed run."""

    def __init__(self, folder: Path) -> None:
        self._writer = _library("tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """A W&B run under `<run>/wandb`. Offline runs cannot be resumed there, so each part of a resumed run is a run of
    its own in the group of the run folder; `wandb sync` uploads offline ones later.
    """

    def __init__(self, folder: Path, config: MonitorConfig, settings: dict[str, Any]) -> None:
        library = _library("wandb")
        try:
            self._run = library.init(
                project=config.project,
                group=folder.name,
                dir=str(folder),
                mode=config.wandb,
                config=settings,
            )
        except Exception as error:  # wandb has no common base class: usage, communication and start-up errors differ
            raise UserError(
                f"monitor.wandb: {config.wandb!r} could not start: {' '.join(str(error).split())[:200]}; "
                "use --monitor.wandb offline, which needs neither network nor key"
            ) from error

    def log(self, values: dict[str, float], step: int) -> None:
        """One history row."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """End the run; offline, nothing is sent."""
        self._run.finish()


class Trackio:
    """A trackio run in its local SQLite store (`$TRACKIO_DIR`, by default in Hugging Face's cache); nothing leaves the
    machine. What it prints goes to stderr: stdout is for results.
    """

    def __init__(self, folder: Path, config: MonitorConfig, settings: dict[str, Any]) -> None:
        self._library = _library("trackio")
        with contextlib.redirect_stdout(sys.stderr):
            self._library.init(
                project=config.project,
                name=folder.name,
                config=settings,
                resume="allow",
                auto_log_gpu=False,  # NVML's readings come with our records
                auto_log_cpu=False,
            )

    def log(self, values: dict[str, float], step: int) -> None:
        """One row."""
        self._library.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        with contextlib.redirect_stdout(sys.stderr):
            self._library.finish()


def require(config: MonitorConfig) -> None:
    """Import every library that `config` asks for: before there is a run folder, not after.

    Raises:
        UserError: one is not installed, or cannot be imported.
    """
    for key in _LIBRARIES:
        if getattr(config, key) not in (False, "off"):
            _library(key)


def open_trackers(folder: Path, config: MonitorConfig, settings: dict[str, Any]) -> dict[str, Tracker]:
    """The trackers that `config` asks for, by name; `settings` is the run's configuration for their records.

    Raises:
        UserError: a library is not installed, or W&B does not start.
    """
    trackers: dict[str, Tracker] = {}
    if config.tensorboard:
        trackers["tensorboard"] = TensorBoard(folder)
    if config.wandb != "off":
        trackers["wandb"] = Wandb(folder, config, settings)
    if config.trackio:
        trackers["trackio"] = Trackio(folder, config, settings)
    return trackers


# A record's event, and a part of it, -> the group of curves, by the names that people look for.
_GROUPS = {"step": "train", "epoch": "epoch", "epoch/validation": "val", "final/test": "final"}


def scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers in a record, nested ones too, as `group/key/inner`: "train/loss" of an update, "epoch/train/loss" and
    "val/loss" of an epoch, "final/accuracy/value" of the test set, "event/key" of all else.
    """

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, int | float):
            yield prefix, float(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}/{key}", inner)

    groups = {key: _GROUPS.get(f"{event}/{key}", f"{_GROUPS.get(event, event)}/{key}") for key in values}
    return dict(pair for key, value in values.items() if key != "step" for pair in walk(groups[key], value))


class Trackers:
    """All trackers of a run. One that fails while the run goes on is dropped with a warning: a tracker must not end a
    four-week run.
    """

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers

    def log(self, event: str, values: dict[str, Any]) -> None:
        """Send the numbers of one record."""
        if not self._trackers:
            return
        numbers, step = scalars(event, values), int(values.get("step", 0))
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(numbers, step))

    def close(self) -> None:
        """Close every tracker that is still in use."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, action: Any) -> None:
        try:
            action()
        except Exception as error:  # other people's code, network and disk: anything may come
            del self._trackers[name]
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _LOG.warning("%s failed and is switched off (%s); log.jsonl goes on", name, what)
