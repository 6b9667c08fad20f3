"""Trackers and NVML through the real libraries, without a network: what they have stored is read back.

pip install 'astrobiogen[tensorboard,wandb,trackio]' nvidia-ml-py; a test of a library that is not installed is skipped.
"""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from astrobiogen.training.observe.monitor import read_log

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from pathlib import Path
from astrobiogen.training.config import MonitorConfig
from astrobiogen.training.monitor import Monitor
folder, tracker = Path(sys.argv[1]), sys.argv[2]
asked = {"wandb": "offline"} if tracker == "wandb" else {tracker: True}
folder.mkdir()
with Monitor(folder, MonitorConfig(progress="plain", project="mine", **asked), {"seed": 3}) as monitor:
    for step in (1, 2):
        monitor.record("step", step=step, loss=1.0 / step, parts={"graph": 2.0 * step}, skipped=False)
    monitor.record_gpu({"0": {"power_watts": 200.0}})
    monitor.record("final", step=2, test={"accuracy": {"value": 0.75}})
"""
WANTED = {
    (1, "train/loss"): 1.0,
    (2, "train/loss"): 0.5,
    (1, "train/parts/graph"): 2.0,
    (2, "train/parts/graph"): 4.0,
    (2, "gpu/cards/0/power_watts"): 200.0,
    (2, "final/accuracy/value"): 0.75,
}

NVML = r"""
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned gpu, memory; } Rates;
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_DRIVER_GONE") ? 9 : 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(size_t)(index + 1); return 0; }
int nvmlDeviceGetName(void *h, char *name, unsigned size) { strncpy(name, "NVIDIA RTX A5000", size); return 0; }
int nvmlDeviceGetUtilizationRates(void *h, Rates *r) { r->gpu = 90 + (size_t)h; r->memory = 40; return 0; }
int nvmlDeviceGetMemoryInfo(void *h, Memory *m) { m->total = 24ull << 30; m->used = (size_t)h << 30; return 0; }
int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) { *mw = 201500; return (size_t)h == 2 ? 3 : 0; }
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *c) { *c = sensor == 0 ? 60 + (size_t)h : 0; return 0; }
"""
READ_CARDS = """
import sys, time
from pathlib import Path
import torch
from astrobiogen.training.config import MonitorConfig
from astrobiogen.training.observe.gpu import GpuSampler
from astrobiogen.training.monitor import Monitor
with Monitor(Path(sys.argv[1]), MonitorConfig(progress="plain")) as monitor:
    monitor.record("step", step=7)
    with GpuSampler(torch.device("cuda"), 0.01, monitor.record_gpu):
        time.sleep(0.3)
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    """Standard error of a process with no way out to the network."""
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    everything = os.environ | closed | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=everything, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "stdout belongs to the results"
    return done.stderr


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run(RUN, str(tmp_path / "run"), "tensorboard")
    event = importlib.import_module("tensorboardX.proto.event_pb2").Event
    (path,) = (tmp_path / "run" / "tensorboard").iterdir()
    data, place, found = path.read_bytes(), 0, {}
    while place < len(data):  # TFRecords: length, its checksum, data, their checksum
        (length,) = struct.unpack_from("<Q", data, place)
        record = event.FromString(data[place + 12 : place + 12 + length])
        found |= {(record.step, value.tag): value.simple_value for value in record.summary.value}
        place += length + 16
    assert WANTED.items() <= found.items()


def wandb_records(path: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, place, records, part = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(part)
            part = b""
        left = 32768 - place % 32768
        place += left if left < 7 else 0
    return records


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    said = run(RUN, str(tmp_path / "run"), "wandb", WANDB_API_KEY="", HOME=str(tmp_path))
    assert "offline" in said
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = [record.FromString(data) for data in wandb_records(path)]
    found: dict[Any, Any] = {}
    for one in records:
        items = one.history.item if one.WhichOneof("record_type") == "history" else ()
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        found |= {(values.get("_step"), name): value for name, value in values.items()}
    assert WANTED.items() <= found.items()
    (begun,) = (one.run for one in records if one.WhichOneof("record_type") == "run")
    assert begun.project == "mine"
    assert begun.run_group == "run"


def test_trackio_keeps_its_store_here(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run(RUN, str(tmp_path / "run"), "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    read = (
        "import sys; from trackio.sqlite_storage import SQLiteStorage as S;"
        "sys.stderr.write(repr((S.get_logs('mine', 'run'), S.get_run_config('mine', 'run')['seed'])))"
    )
    rows, seed = eval(run(read, TRACKIO_DIR=str(tmp_path / "store")), {"nan": float("nan")})
    found = {(row["step"], name): value for row in rows for name, value in row.items()}
    assert WANTED.items() <= found.items()
    assert not any(name.startswith("system") or "cpu" in name for _, name in found)
    assert seed == 3


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1 that shows two cards, the second of which does not tell its power."""
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(NVML)
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return folder


def test_cards_are_read_through_nvml(driver: Path, tmp_path: Path) -> None:
    said = run(READ_CARDS, str(tmp_path), LD_LIBRARY_PATH=str(driver))
    assert "GPU statistics: every 0.01 s of NVIDIA RTX A5000, NVIDIA RTX A5000" in said
    readings = [record for record in read_log(tmp_path / "log.jsonl") if record["event"] == "gpu"]
    assert len(readings) > 3
    common = {"memory_traffic_percent": 40.0, "memory_total_mib": 24576.0}
    assert readings[0]["cards"] == {
        "0": common
        | {"utilisation_percent": 91.0, "memory_used_mib": 1024.0, "power_watts": 201.5, "temperature_celsius": 61.0},
        "1": common | {"utilisation_percent": 92.0, "memory_used_mib": 2048.0, "temperature_celsius": 62.0},
    }
    assert readings[0]["step"] == 7


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"FAKE_DRIVER_GONE": "1"}, "Driver Not Loaded"), ({"LD_LIBRARY_PATH": ""}, "")],
    ids=["driver gone", "no library"],
)
def test_without_a_driver_there_is_one_line(
    driver: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    if not reason and Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    said = run(READ_CARDS, str(tmp_path), **({"LD_LIBRARY_PATH": str(driver)} | environment))
    expected = reason or "NVML Shared Library Not Found"
    assert said.count(f"GPU statistics: none, NVML does not start ({expected})") == 1
