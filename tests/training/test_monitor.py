"""What a run tells: trackers, GPU statistics, rates, log files."""

import dataclasses
import json
import logging
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from astrobiogen import train
from astrobiogen.training.config import MonitorConfig, PrecisionConfig, TrainConfig
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe.gpu import GpuSampler
from astrobiogen.training.observe.monitor import Monitor, read_log
from astrobiogen.training.observe.trackers import scalars
from astrobiogen.training.optim import matmul_rate, precision
from astrobiogen.training.tools import throughput
from tests.training.conftest import toy_config, toy_task

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = {"progress": "plain", "level": "INFO"}


class FakeBoard:
    """A module with the calls of tensorboardX, wandb and trackio that we make; it keeps what it is told."""

    def __init__(self, broken: bool = False) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []
        self.started: dict[str, Any] = {}
        self.closed = 0
        self._broken = broken

    def SummaryWriter(self, folder: str) -> "FakeBoard":
        self.started = {"folder": folder}
        return self

    def init(self, **options: Any) -> "FakeBoard":
        if options.get("mode") == "online":
            raise RuntimeError("no network\nand no key")
        self.started = options
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._broken:
            raise ConnectionError("gone")
        self.rows.append((values, step))

    def finish(self) -> None:
        self.closed += 1

    close = finish


def settings(name: str) -> MonitorConfig:
    options: dict[str, Any] = {"tensorboardX": {"tensorboard": True}, "wandb": {"wandb": "offline"}}
    return MonitorConfig(**PLAIN, **options.get(name, {"trackio": True}), project="mine")  # type: ignore[arg-type]


TRACKERS = ("tensorboardX", "wandb", "trackio")


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_get_every_number(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = FakeBoard()
    monkeypatch.setitem(sys.modules, name, board)  # type: ignore[arg-type]
    with Monitor(tmp_path, settings(name), {"seed": 3}) as monitor:
        monitor.record("step", step=4, loss=0.5, parts={"graph": 2.0}, skipped=False, why="text")
        monitor.record_gpu({"0": {"power_watts": 200.0}})
        monitor.record("epoch", step=6, validation={"loss": 1.5, "parts": {"graph": 1.0}})
    got = {(key, step): value for values, step in board.rows for key, value in values.items()}
    assert got == {
        ("train/loss", 4): 0.5,
        ("train/parts/graph", 4): 2.0,
        ("train/skipped", 4): 0.0,
        ("gpu/cards/0/power_watts", 4): 200.0,
        ("val/loss", 6): 1.5,
        ("val/parts/graph", 6): 1.0,
    }
    assert board.closed == 1
    if name == "tensorboardX":
        assert board.started == {"folder": str(tmp_path / "tensorboard")}
    else:
        assert board.started["project"] == "mine"
        assert board.started["config"] == {"seed": 3}
        assert name == "trackio" or board.started["mode"] == "offline"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_one_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    extra = name.removesuffix("X")
    text = rf"monitor\.{extra}: needs {name}: pip install 'astrobiogen\[{extra}\]'; the import said"
    handlers = list(logging.getLogger("astrobiogen").handlers)
    with pytest.raises(UserError, match=text), Monitor(tmp_path, settings(name)):
        pass
    assert logging.getLogger("astrobiogen").handlers == handlers
    value = "offline" if extra == "wandb" else "true"
    assert train.main(["--smoke", f"--monitor.{extra}", value, "--output", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", FakeBoard(broken=True))  # type: ignore[arg-type]
    with Monitor(tmp_path, settings("trackio")) as monitor:
        monitor.record("step", step=1, loss=0.5)
        monitor.record("step", step=2, loss=0.4)
    assert caplog.text.count("trackio failed and is switched off (ConnectionError: gone)") == 1
    assert [record["loss"] for record in read_log(tmp_path / "log.jsonl")] == [0.5, 0.4]
    monkeypatch.setitem(sys.modules, "wandb", FakeBoard())  # type: ignore[arg-type]
    with (
        pytest.raises(
            UserError, match=r"'online' could not start: no network and no key; use --monitor\.wandb offline"
        ),
        Monitor(tmp_path, MonitorConfig(wandb="online")),
    ):
        pass


def test_scalars_keep_events_apart() -> None:
    record = {"step": 3, "a": 1, "b": {"c": True, "d": {"e": 2.5}}, "f": "text", "g": None}
    assert scalars("x", record) == {"x/a": 1.0, "x/b/c": 1.0, "x/b/d/e": 2.5}


class FakeNvml(types.SimpleNamespace):
    """pynvml with two cards, the second of which does not tell its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818 - pynvml's name
        pass

    def __init__(self, driver: bool = True, lost_after: int = 10**9) -> None:
        super().__init__(driver=driver, lost_after=lost_after, reads=0, open=0)

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:
        return b"RTX A5000" if handle else "RTX A5000"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> types.SimpleNamespace:
        self.reads += 1
        if self.reads > self.lost_after:
            raise self.NVMLError("GPU is lost")
        return types.SimpleNamespace(gpu=90 + handle, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(used=(handle + 1) * 2**30, total=24 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise self.NVMLError_NotSupported
        return 201_500

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61 + handle


def test_gpu_statistics_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml()
    with Monitor(tmp_path, MonitorConfig(**PLAIN)) as monitor:  # type: ignore[arg-type]
        monitor.record("step", step=7, loss=1.0)
        with GpuSampler(CUDA, 0.01, monitor.record_gpu, nvml):
            end = time.monotonic() + 10
            while nvml.reads < 6 and time.monotonic() < end:
                time.sleep(0.005)
    assert "GPU statistics: every 0.01 s of RTX A5000, RTX A5000" in caplog.text
    readings = [record for record in read_log(tmp_path / "log.jsonl") if record["event"] == "gpu"]
    assert len(readings) >= 3
    assert readings[0]["step"] == 7
    common = {"memory_traffic_percent": 40.0, "memory_total_mib": 24576.0}
    assert readings[0]["cards"] == {
        "0": common
        | {"utilisation_percent": 90.0, "memory_used_mib": 1024.0, "power_watts": 201.5, "temperature_celsius": 61.0},
        "1": common | {"utilisation_percent": 91.0, "memory_used_mib": 2048.0, "temperature_celsius": 62.0},
    }
    assert nvml.open == 0
    assert not any(thread.name == "gpu statistics" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("device", "seconds", "library", "text"),
    [
        (CPU, 30.0, None, "GPU statistics: none, the run is on the cpu"),
        (CUDA, 0.0, None, r"GPU statistics: switched off"),
        (CUDA, 30.0, None, "nvidia-ml-py is not installed"),
        (CUDA, 30.0, FakeNvml(driver=False), "NVML does not start (Driver Not Loaded)"),
        (CUDA, 0.01, FakeNvml(lost_after=2), "GPU statistics: ended, NVML says GPU is lost"),
    ],
)
def test_without_statistics_there_is_one_line(
    device: torch.device,
    seconds: float,
    library: Any,
    text: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read: list[Any] = []
    with caplog.at_level(logging.INFO, "astrobiogen"), GpuSampler(device, seconds, read.append, library):
        time.sleep(0.1 if library and library.driver else 0.0)
    assert caplog.text.count(text) == 1
    assert len(read) == (1 if library and library.driver else 0)


def test_log_file_is_configurable(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "run.txt"
    with Monitor(tmp_path, MonitorConfig(**PLAIN, log_file=str(path))) as monitor:  # type: ignore[arg-type]
        monitor.logger.warning("hello")
    assert path.read_text().split(" ", 2)[2] == "WARNING hello\n"
    (tmp_path / "file").write_text("")
    bad = MonitorConfig(**PLAIN, log_file=str(tmp_path / "file" / "x"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"monitor\.log_file: .* cannot be written"), Monitor(tmp_path, bad):
        pass


def test_rates() -> None:
    speed = throughput.Throughput(flops_per_sample=2e9, peak=1e11)
    assert speed.rates(0.5, 8, 640) == {
        "seconds": 0.5,
        "samples_per_second": 16.0,
        "tokens_per_second": 1280.0,
        "mfu": 0.32,
    }
    assert set(throughput.Throughput().rates(0.5, 8, 0)) == {"seconds", "samples_per_second"}
    assert matmul_rate.matmul_rate(CPU, torch.float32, 0.02) > 1e8


def test_operations_are_counted_without_a_trace() -> None:
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Dropout(0.5), nn.BatchNorm1d(64)).train()
    before = [value.clone() for value in model.state_dict().values()]
    state = torch.get_rng_state()
    flops = throughput.count_flops(model, lambda outputs, _: (outputs.mean(), {}), torch.ones(8, 32))  # type: ignore[arg-type]
    assert flops == 3 * 2 * 8 * 32 * 64
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    task = toy_task(toy_config())
    assert throughput.measure(task, CPU, torch.float32).flops_per_sample > 0


def test_counting_takes_no_memory_and_an_unknown_number_is_not_told() -> None:
    def hungry(output: Any, _: Any) -> Any:
        return torch.empty(2**55, device=output["logits"].device), {}

    with torch.device("meta"):
        large = nn.Linear(2**20, 2**20)
    flops = throughput.count_flops(large, lambda outputs, _: (outputs.mean(), {}), torch.ones(2, 2**20))  # type: ignore[arg-type]
    assert flops == 3 * 2 * 2 * 2**40
    task = dataclasses.replace(toy_task(toy_config()), loss_function=hungry)
    assert throughput.measure(task, CPU, torch.float32).flops_per_sample > 0
    assert "GFLOP per sample" not in throughput.Throughput(0.0, 1e9).describe()
    assert throughput.Throughput(1e9, 1e9).describe().startswith("1 GFLOP per sample")


def test_a_share_above_one_is_not_told() -> None:
    assert "mfu" not in throughput.Throughput(flops_per_sample=2e9, peak=1e9).rates(0.5, 8, 0)


def test_the_peak_in_half_precision_is_that_of_the_units_which_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100e9, torch.float16: 20e9}
    monkeypatch.setattr(matmul_rate, "matmul_rate", lambda _device, dtype: rates[dtype])
    assert throughput.measure(toy_task(toy_config()), CPU, torch.float16).peak == 100e9


def test_rates_are_in_the_log_and_cover_the_run(make_run: Any, tmp_path: Path) -> None:
    run = make_run(toy_config(epochs=2))
    started = time.monotonic()
    run.trainer.fit()
    elapsed = time.monotonic() - started
    records = read_log(tmp_path / "run" / "log.jsonl")
    steps = [record["speed"] for record in records if record["event"] == "step"]
    assert all(
        speed["tokens_per_second"] == pytest.approx(2 * speed["samples_per_second"], rel=0.01) for speed in steps
    )
    # Each speed is rounded to a tenth of a millisecond.
    assert sum(speed["seconds"] for speed in steps) - 1e-4 * len(steps) <= run.trainer.progress.seconds <= elapsed
    assert "Infinity" not in json.dumps(list(records))


def test_auto_precision_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100e9, torch.bfloat16: 149e9}
    monkeypatch.setattr(matmul_rate, "matmul_rate", lambda _device, dtype: rates[dtype])
    assert precision.choose_dtype(PrecisionConfig(), CPU) == (
        torch.float32,
        "auto: matrix products reach 149 GFLOP/s in bf16 and 100 in fp32 here",
    )
    rates[torch.bfloat16] = 150e9
    dtype, _ = precision.choose_dtype(PrecisionConfig(), CPU)
    assert dtype == torch.bfloat16
    assert precision.resolved(TrainConfig(), dtype).precision.dtype == "bf16"
    for capability, supported, expected in (
        ((8, 6), True, torch.float16),
        ((9, 0), True, torch.bfloat16),
        ((7, 5), False, torch.float16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)  # noqa: ARG005
        assert precision.choose_dtype(PrecisionConfig(), CUDA)[0] == expected
