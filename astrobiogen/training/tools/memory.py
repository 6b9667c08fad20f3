"""Where the bytes go while training: the plan against a measured update, and the report when memory runs out."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from astrobiogen.system import console
from astrobiogen.training import evaluation
from astrobiogen.training.batches import loading
from astrobiogen.training.config import TrainConfig, run_folder
from astrobiogen.training.context import Run
from astrobiogen.training.distributed.model import gathered_bytes
from astrobiogen.training.optim import precision
from astrobiogen.training.optim.optimizer import inner_of
from astrobiogen.training.tools import plan
from astrobiogen.training.update import Updater

_LOG = logging.getLogger("astrobiogen")
OUT_OF_MEMORY = "oom_report.json"
# Outside this band of measured / planned the log says so.
_BAND = (0.9, 1.1)
_MIB = 2**20
# PyTorch's profiler prints these on stderr from C++, whatever its log level.
_NATIVE_MESSAGES = (b"SyncActivityProfilerHandler.cpp", b"CPUAllocator.cpp")


def held(updater: Updater, batch: loading.Batch | None = None) -> dict[str, int]:
    """Bytes of the live tensors by category, each storage counted once."""
    model, average = updater.model, updater.average
    state = [value for moments in inner_of(updater.optimizer).state.values() for value in moments.values()]
    parts: dict[str, list[Any]] = {
        "weights": [*model.parameters(), *model.buffers()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "optimizer": state,
        "averaged weights": list(average.averages.values()) if average else [],
        "batch": [batch] if batch else [],
    }
    return {name: plan.tensor_bytes(values) for name, values in parts.items()}


class MemoryProbe:
    """Measures one micro-batch with its update in every process, once, and compares it with what the plan says of the
    same batch.

    On a GPU the allocator's own peak is read; on a CPU the profiler records every allocation of PyTorch. Not in either:
    the CUDA context and libraries, Python, and what libraries allocate by themselves.

    Args:
        run: in its folder process 0 writes memory_report.json, the report of the process that needed most, with all of
            them.
    """

    def __init__(self, run: Run, updater: Updater, loss_function: evaluation.LossFunction) -> None:
        self._run = run
        self._loss_function = loss_function
        self._updater = updater
        self._done = False

    def due(self, closes: bool) -> bool:
        """Whether the coming micro-batch is the one: the last of the second window, when the optimizer has state."""
        return closes and not self._done and self._updater.updates == 1

    @contextlib.contextmanager
    def watching(self, batch: loading.Batch) -> Iterator[None]:
        """Around the micro-batch and its update."""
        self._done = True
        before = held(self._updater, batch)
        before |= self._exchanged(before)
        planned = self._planned(before, batch)
        with self._peak(sum(before.values())) as peak:
            yield
        # All that was alive at the peak beyond what is held.
        measured = {**before, "activations and temporaries": peak[0] - sum(before.values())}
        self._write(planned, measured)

    def _planned(self, before: Mapping[str, int], batch: loading.Batch) -> dict[str, int]:
        """Counted states and what a rehearsal of the micro-batch holds; nothing of the run is touched."""
        updater, config, dtype = self._updater, self._run.config, self._run.dtype
        counted = plan.state_plan(updater.model, config)
        gradients = before["gradients"]  # freed after each update, so absent at the peak of a window of one micro-batch
        return {
            "weights": counted.weights,
            "gradients": counted.gradients if gradients else 0,
            "optimizer": counted.optimizer,
            "averaged weights": counted.average,
            "batch": plan.tensor_bytes(batch),
            **self._exchanged(before),
            "activations and temporaries": self._sharded(batch)
            if updater.parallel.sharded
            else plan.moving_bytes(
                updater.model,
                self._loss_function,
                batch,
                dtype,
                accumulating=bool(gradients) or updater.parallel.strategy == "ddp",
            ),
        }

    def _sharded(self, batch: loading.Batch) -> int:
        """Of a model in shards, whose tensors cannot be done without: what a forward pass over `batch` saves."""
        updater = self._updater

        def run() -> torch.Tensor:
            with precision.autocast(self._run.device, self._run.dtype):
                return updater.parallel.whole_objective(batch, None)[0]

        with evaluation.untouched(updater.model):
            return plan.saved_bytes(updater.model, run) + gathered_bytes(updater.model, self._run.dtype)

    def _exchanged(self, before: Mapping[str, int]) -> dict[str, int]:
        """What the processes keep for each other: DDP's buckets, of which gradients are views while there are any."""
        if self._updater.parallel.strategy != "ddp":
            return {}
        counted = plan.state_plan(self._updater.model, self._run.config).gradients
        return {"gradient buckets": 0 if before["gradients"] else counted}

    @contextlib.contextmanager
    def _peak(self, start: int) -> Iterator[list[int]]:
        """Yields a list that holds the peak in bytes afterwards."""
        result = [0]
        if self._run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._run.device)
            yield result
            result[0] = torch.cuda.max_memory_allocated(self._run.device)
            return
        recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with console.without_native_lines(_NATIVE_MESSAGES), recorded:
            yield result
        now = highest = start
        for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                now += event.nbytes()  # type: ignore[attr-defined]
                highest = max(highest, now)
        result[0] = highest

    def _write(self, planned: dict[str, int], measured: dict[str, int]) -> None:
        device, world = self._run.device, self._run.world
        total_planned, total = sum(planned.values()), sum(measured.values())
        report: dict[str, Any] = {
            "planned_bytes": planned | {"total": total_planned},
            "measured_bytes": measured | {"total": total},
            "measured_over_planned": round(total / total_planned, 4),
            "device": str(device),
            "torch": torch.__version__,
            "method": "allocator peak of the device" if device.type == "cuda" else "profiler's CPU allocations",
        }
        if device.type == "cuda":
            report["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            report["device_bytes"] = torch.cuda.mem_get_info(device)[1]
        reports = world.gather(report)
        if not world.main:
            return
        report = max(reports, key=lambda one: one["measured_bytes"]["total"])
        if world.distributed:
            report = report | {"processes": reports}
        try:
            run_folder.write_json(self._run.folder / run_folder.MEMORY, report)
        except OSError as error:  # a full disk may have room again when something must be saved
            _LOG.error("%s could not be written (%s)", self._run.folder / run_folder.MEMORY, error.strerror or error)
        self._say(report, world.size)

    def _say(self, report: dict[str, Any], processes: int) -> None:
        planned, measured = (report[f"{kind}_bytes"]["total"] / _MIB for kind in ("planned", "measured"))
        ratio = measured / planned
        whose = f" in the largest of {processes} processes" if processes > 1 else ""
        text = f"memory: {measured:,.0f} MiB at the peak of an update{whose}, {ratio:.2f} of {planned:,.0f} planned"
        if _BAND[0] <= ratio <= _BAND[1]:
            _LOG.info(text)
        else:
            _LOG.warning("%s; see %s", text, self._run.folder / run_folder.MEMORY)


def advice(config: TrainConfig, bytes_held: Mapping[str, int]) -> list[str]:
    """Settings that need less memory, the ones that change the least first. A new run is needed for each."""
    data, optimizer = config.data, config.optimizer
    result = []
    if data.batch_size > 1:
        options = plan.same_update(config, data.batch_size // 2)
        result.append(f"{options} (the same update from smaller parts)")
    checkpointing = [
        f"--model.{group}.use_gradient_checkpointing true"
        for group in ("cnn_config", "graph_config", "llm_config")
        if getattr(config.model, group).use_gradient_checkpointing is None
    ]
    if checkpointing:
        result.append(f"{' '.join(checkpointing)} (recompute activations: same result, about a third slower)")
    if optimizer.name == "adamw":
        saved = bytes_held.get("optimizer", 0) * 3 // 4 / _MIB
        result.append(f"--optimizer.name adamw8bit (moments in 8 bits: {saved:,.0f} MiB less)")
    if optimizer.ema_decay:
        saved = bytes_held.get("averaged weights", 0) / _MIB
        result.append(f"--optimizer.ema_decay 0 (no averaged weights: {saved:,.0f} MiB less)")
    if config.precision.dtype == "fp32":
        result.append("--precision.dtype bf16 (activations of half the size)")
    if config.preset not in ("tiny", "small"):
        result.append("--preset small (a smaller model)")
    return result


def _process_peak() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What was held when memory ran out, and what to do.

    Attributes:
        message: the library's own words.
        bytes_held: by category; "activations and temporaries" is the rest of the peak.
        peak: bytes; of the device's allocator on a GPU, of the whole process on a CPU.
        settings: command-line options that need less, see `advice`.
    """

    message: str
    bytes_held: dict[str, int]
    peak: int
    device: str
    settings: list[str]

    def write(self, folder: Path) -> None:
        """As oom_report.json."""
        run_folder.write_json(folder / OUT_OF_MEMORY, dataclasses.asdict(self))

    def line(self, folder: Path) -> str:
        """The report in one line."""
        parts = ", ".join(f"{name} {value / _MIB:,.0f}" for name, value in self.bytes_held.items() if value)
        return (
            f"out of memory on {self.device}: {self.message}; peak {self.peak / _MIB:,.0f} MiB, of it {parts}; "
            f"next: {'; or '.join(self.settings)}; details: {folder / OUT_OF_MEMORY}"
        )


def examine(error: BaseException, run: Run, updater: Updater) -> OutOfMemory:
    """The report on `error`, which `is_out_of_memory`."""
    kept, device = held(updater), run.device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_peak()
    kept["activations and temporaries" if device.type == "cuda" else "activations, libraries and data"] = max(
        peak - sum(kept.values()), 0
    )
    message = " ".join(str(error).split())[:200]
    return OutOfMemory(message, kept, peak, str(device), advice(run.config, kept))
