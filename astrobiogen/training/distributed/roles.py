"""What a whole run does otherwise when several processes share it."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from astrobiogen.training.config import MonitorConfig, TrainConfig
from astrobiogen.training.config.as_dict import to_dict
from astrobiogen.training.distributed.world import World
from astrobiogen.training.observe.watchdog import Watchdog, limits_of

_LOG = logging.getLogger("astrobiogen")


def sharded(world: World, config: TrainConfig) -> bool:
    """Whether parameters are split over the processes."""
    return world.distributed and config.distributed.strategy == "fsdp2"


def facts(world: World, config: TrainConfig) -> dict[str, Any]:
    """For environment.json."""
    return {"processes": world.size, "strategy": config.distributed.strategy if world.distributed else "single"}


def monitored(world: World, folder: Path, config: TrainConfig) -> tuple[Path, MonitorConfig, dict[str, Any]]:
    """Arguments of this process's `Monitor`: the whole record for process 0; for others warnings, and a log of their
    own."""
    if world.main:
        return folder, config.monitor, to_dict(config)
    own = folder / f"process-{world.rank}"
    own.mkdir(exist_ok=True)
    level = "ERROR" if config.monitor.level == "ERROR" else "WARNING"
    settings = dataclasses.replace(
        config.monitor, progress="plain", level=level, log_file="", tensorboard=False, wandb="off", trackio=False
    )
    return own, settings, {}


def watchdog(world: World, folder: Path, config: TrainConfig) -> Watchdog:
    """Ends this process if it hangs, and leaves word for the others."""
    return Watchdog(folder, limits_of(config.hang), (world.rank, world.size), world.write_down)


def announce(world: World, config: TrainConfig) -> None:
    """Say how the work is shared."""
    data, strategy = config.data, config.distributed.strategy
    if world.distributed:
        size = data.batch_size * data.accumulation
        _LOG.info("%d processes, %s: they share the %d samples of each update", world.size, strategy, size)
    elif strategy == "fsdp2":
        start = "python -m torch.distributed.run --nproc-per-node GPUS -m astrobiogen.train ..."
        _LOG.warning("distributed.strategy fsdp2, but one process holds everything here; start several: %s", start)
