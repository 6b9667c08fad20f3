"""The folder of a run: where everything about it is found afterwards."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import astrobiogen
from astrobiogen.training.errors import UserError

MEMORY = "memory_report.json"
CONFIG, ENVIRONMENT, METRICS, REPORT = "config.yaml", "environment.json", "metrics.json", "report.html"
LOCK, RECORDS, LOG, CRASH = ".lock", "log.jsonl", "train.log", "crash.log"
# How the last part of a run has ended; while it trains, and after a kill, neither is there.
PREEMPTED, FINISHED = "PREEMPTED", "FINISHED"
_ASIDE = re.compile(r"(?:config|environment|metrics|report|memory|oom|nonfinite|lr_finder|PREEMPTED|FINISHED)"
                    r"[\w.-]*\.tmp-[0-9a-f]{8}")  # fmt: skip
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
    """Write a file so that readers see the old or the new text, never a part, whatever ends process or machine.

    Raises:
        OSError: the disk is full, ...; the old text stays, and nothing else is left behind.
    """
    aside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def is_aside(path: Path) -> bool:
    """Whether a killed process left this while it wrote a file of a run."""
    return bool(_ASIDE.fullmatch(path.name))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` has written there; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def git_commit() -> str:
    """Commit of the source tree (with `+` if it has changes), or an empty string for an installed package."""
    source = Path(__file__).resolve().parents[3]
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
