"""The folder of a run: where everything about it is found afterwards."""

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import astrobiogen
from astrobiogen.training.errors import UserError

CONFIG, ENVIRONMENT, METRICS, REPORT = "config.yaml", "environment.json", "metrics.json", "report.html"
LOCK = ".lock"
_LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "torch-geometric",
    "jsonargparse",
    "bitsandbytes",
)


def create(output: str, preset: str) -> Path:
    """Make the run folder; without a name it is `runs/<date>-<preset>`.

    Raises:
        UserError: the folder is not empty, is a file, or cannot be made.
    """
    if output:
        folder = Path(output)
    else:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{stamp}-{preset}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"--output: {folder} exists and is not an empty folder; name another one, "
                f"or go on with the run in it by --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error.strerror or error}") from error
    return folder


def discard_unbegun(folder: Path) -> None:
    """Take back a run folder in which no training began, so that the command, put right, can use its name. Only what
    the beginning of a run writes is deleted; with anything else in it the folder stays.
    """
    names = {CONFIG, ENVIRONMENT, LOCK, "log.jsonl", "train.log"}
    parts = [folder, *folder.glob("process-*")]
    files = [path for part in parts for path in part.iterdir() if path not in parts]
    if any(path.name not in names or not path.is_file() for path in files):
        return
    for path in files:
        path.unlink()
    for part in reversed(parts):
        part.rmdir()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run folder for this process alone, until it ends, however it ends.

    Raises:
        UserError: another process is training in it, or it cannot be written.
    """
    try:
        file = (folder / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}", exit_code=1) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is training in this folder", exit_code=1) from error
        yield


def find(path: str) -> Path:
    """An existing run folder, to resume or evaluate.

    Raises:
        UserError: there is no run in `path`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the folder of a run (it holds {CONFIG} and checkpoints/)")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} in it, so this is not the folder of a run")
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new text, never a part."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` has written there; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file that we wrote.

    Raises:
        UserError: not readable, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: got {type(value).__name__}, expected keys and values")
    return value


def git_commit() -> str:
    """Commit of the source tree (with `+` if it has changes), or an empty string for an installed package."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return ""
    try:
        head = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", str(source), "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def environment(runtime: dict[str, Any]) -> dict[str, Any]:
    """Everything needed to judge or repeat a run: versions, commit, machine, kernels, seeds."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "astrobiogen": _version("astrobiogen"),
        "git": git_commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "runtime": runtime,
        "kernels": [dataclasses.asdict(row) for row in astrobiogen.kernel_status()],
    }
