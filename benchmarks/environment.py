"""What a figure was measured on: commit, versions, device, date, and how much of a core the run had."""

import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

PEERS = ("liger-kernel", "xformers", "flash-attn", "fla-core", "quack-kernels")


def facts(device: torch.device) -> dict[str, Any]:
    """The environment as a flat record for the result files."""
    name = device_name(device)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": name,
        "device_slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "core_share": round(harness.contention(), 3),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "peers": {peer: version(peer) for peer in PEERS},
    }
    if device.type == "cuda":
        found |= gpu_facts(device)
    return found


def device_name(device: torch.device) -> str:
    """E.g. "NVIDIA RTX A5000", or the CPU's vector capability, core count and model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE)
        model = match.group(1) if match else model
    return f"CPU {model} {os.cpu_count()} cores {torch.backends.cpu.get_cpu_capability()}{lowered_level()}"


def lowered_level() -> str:
    """ ", ours at avx2" where ``--cpu-level`` lowered our kernels; empty otherwise."""
    if importlib.util.find_spec("astrobiogen._C") is None:
        return ""
    extension = importlib.import_module("astrobiogen._C")
    level = extension.cpu_capability()
    return "" if level == extension.cpu_levels()[-1] else f", ours at {level}"


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Capability, multiprocessors, clocks and power limit (what `nvidia-smi` answers)."""
    properties = torch.cuda.get_device_properties(device)
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        answer = f"nvidia-smi: {error}"
    return {
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        fields: answer,
    }


def commit() -> str:
    """Short commit of the checkout, with "+" if files differ from it; "unknown" outside one."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


def version(package: str) -> str:
    """Installed version, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
