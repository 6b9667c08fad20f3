"""The run that a preflight is about: its data, its model without memory, and a short run of the same command."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astrobiogen.data import DatasetBundle
from astrobiogen.training import launch
from astrobiogen.training.batches import assemble, loading
from astrobiogen.training.config import TrainConfig, run_config, run_folder
from astrobiogen.training.config.model import ModelChanges
from astrobiogen.training.distributed import runtime
from astrobiogen.training.tools import plan

# Samples and epochs of the short run: four updates of two epochs, each with a checkpoint.
_SAMPLES, _EPOCHS = 8, 2
_LIMIT_SECONDS = 900.0
_AS_THEY_ARE = ("tiny", "small")
PACKAGE = Path(__file__).parents[3]


class NotHereError(Exception):
    """A check needs what this machine has not: that is no failure, and no success."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended, with what it printed, and the run folder it was given."""

    folder: Path
    status: int
    output: str
    messages: str

    def records(self, event: str) -> list[dict[str, Any]]:
        """The lines of log.jsonl of one kind."""
        lines = (self.folder / run_folder.RECORDS).read_text(encoding="utf-8").splitlines()
        return [record for line in lines if (record := json.loads(line))["event"] == event]


class Subject:
    """A run that is to be made.

    Args:
        config: of the run.
        output: where it will be; empty: below the present folder.
        memory_gib: what it may use of each device; 0: see `room.allowance`.
        processes: how many it is for; 0: see `room.expected_processes`.
        scratch: an empty folder for what the checks write.
    """

    def __init__(self, config: TrainConfig, scratch: Path, output: str = "", memory: float = 0.0, processes: int = 0):
        self.config = config
        self.scratch = scratch
        self.place = Path(output).absolute() if output else Path.cwd()
        self.memory_gib, self.processes = memory, processes
        self.device = runtime.choose_device(config.runtime.device)
        self._ran: dict[str, Ended] = {}

    @property
    def whole_size(self) -> bool:
        """Whether the short run trains the run's own model; else the tiny one stands in."""
        return self.config.preset in _AS_THEY_ARE

    @property
    def stands_in(self) -> str:
        """To be said where the model of the short run is not the run's own."""
        return "" if self.whole_size else f" (with the tiny model: {self.config.preset} is too large to try)"

    @functools.cached_property
    def bundle(self) -> DatasetBundle:
        """The data of the run."""
        return assemble.load_bundle(self.config)

    @functools.cached_property
    def without_memory(self) -> assemble.Assembly:
        """The run's own model, on the device meta."""
        return assemble.assemble(self.config, self.bundle, "meta")

    @functools.cached_property
    def largest(self) -> loading.Batch:
        """The micro-batch of the largest graphs."""
        return plan.largest_batch(self.without_memory, self.config)

    @functools.cached_property
    def short(self) -> TrainConfig:
        """The configuration of the short run: the run's own, on a few samples, for two epochs."""
        config = self.config if self.whole_size else dataclasses.replace(
            self.config, preset="tiny", model=ModelChanges()
        )  # fmt: skip
        data, size = config.data, min(config.data.batch_size, 2)
        parts = 2 if data.accumulation > 1 or size == 1 else 1
        path = str(Path(data.path).absolute()) if data.path else ""
        wandb = "off" if config.monitor.wandb == "off" else "offline"
        return dataclasses.replace(
            config,
            epochs=_EPOCHS,
            data=dataclasses.replace(
                data, path=path, limit=_SAMPLES, batch_size=size, accumulation=parts, workers=min(data.workers, 1)
            ),
            checkpoint=dataclasses.replace(config.checkpoint, every_epochs=1, keep=max(config.checkpoint.keep, 2)),
            stop=dataclasses.replace(config.stop, patience=0, target_accuracy=1.0),
            monitor=dataclasses.replace(
                config.monitor, progress="plain", level="INFO", log_file="", wandb=wandb, trackio=False
            ),
            evaluation=dataclasses.replace(
                config.evaluation, batch_size=_SAMPLES // 2, bootstrap=20, baselines=False, ablation=False
            ),
        )

    @functools.cached_property
    def assembly(self) -> assemble.Assembly:
        """Data and model of the short run."""
        runtime.seed_everything(self.config.seed)
        return assemble.assemble(self.short, assemble.load_bundle(self.short))

    def batch(self) -> loading.Batch:
        """The first micro-batch of the short run, on the CPU."""
        task = self.assembly.task
        indices = next(iter(task.sampler.batches(0)))
        return task.collate([task.train[index] for index in indices])

    @property
    def ran(self) -> Ended:
        """The short run, made once.

        Raises:
            ValueError: it failed; with its last words.
        """
        if "short" not in self._ran:
            self._ran["short"] = self.run("short")
        return succeeded(self._ran["short"])

    def run(self, name: str, *options: str, processes: int = 1) -> Ended:
        """`python -m astrobiogen.train` with the short configuration in the folder `name`, in a process of its own."""
        with self._begun(name, *options, processes=processes) as process:
            output, messages = process.communicate(timeout=_LIMIT_SECONDS)
        return Ended(self.scratch / name, process.returncode, output, messages)

    def interrupted(self, name: str) -> Ended:
        """The same, stopped by SIGTERM after its first epoch.

        Raises:
            ValueError: it has ended before.
        """
        folder = self.scratch / name
        records, until = folder / run_folder.RECORDS, time.monotonic() + _LIMIT_SECONDS
        with self._begun(name) as process:
            while not (records.exists() and '"event": "epoch"' in records.read_text(encoding="utf-8")):
                if process.poll() is not None or time.monotonic() > until:
                    raise ValueError(f"no epoch came to its end: {process.communicate()[1][-300:]}")
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            output, messages = process.communicate(timeout=_LIMIT_SECONDS)
        return Ended(folder, process.returncode, output, messages)

    @contextlib.contextmanager
    def _begun(self, name: str, *options: str, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
        config = Path(tempfile.mkdtemp(dir=self.scratch))
        run_config.write(config, self.short)
        several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        place = () if any(option.startswith("--resume") for option in options) else (f"--output={self.scratch / name}",)
        command = [
            sys.executable, *(several if processes > 1 else ()), "-m", "astrobiogen.train",
            *(() if not place else ("--config", str(config / run_folder.CONFIG))), *place, "--force", *options,
        ]  # fmt: skip
        inherited = {key: value for key, value in os.environ.items() if key not in launch.VARIABLES}
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))))
        elsewhere = self.scratch / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        with subprocess.Popen(
            command, env=inherited | {"PYTHONPATH": path}, cwd=elsewhere, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()


def succeeded(ended: Ended) -> Ended:
    """`ended`, if its status is 0.

    Raises:
        ValueError: with its last words.
    """
    if ended.status:
        last = " ".join(ended.messages.split())[-300:]
        raise ValueError(f"{ended.folder.name} run: exit status {ended.status}: {last}")
    return ended


def require(condition: bool, text: str) -> None:
    """Raise ValueError with `text` unless `condition`."""
    if not condition:
        raise ValueError(text)
