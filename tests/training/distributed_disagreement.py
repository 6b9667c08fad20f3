"""The case of `distributed_cases.py` in which the processes do not agree."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from astrobiogen.training import run
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed import World, agreement
from astrobiogen.training.errors import UserError


def told(base: TrainConfig, world: World, folder: Path) -> dict[str, Any]:
    """Processes with other settings, other data or another command: what each is told, and how soon."""
    rank, result = world.rank, {}
    optimizer = dataclasses.replace(base.optimizer, learning_rate=0.01 * (1 + rank))
    private = dataclasses.replace(base.data, path=f"/data/of/{rank}", workers=rank)
    asked: dict[str, Callable[[], Any]] = {
        "seed": lambda: run.train(dataclasses.replace(base, seed=rank), folder, False, world),
        "learning rate": lambda: run.train(dataclasses.replace(base, optimizer=optimizer), folder, False, world),
        "resume": lambda: run.train(base, folder, bool(rank), world),
        "data": lambda: agreement.require(world, {"data": f"content {rank}"}),
        "nothing": lambda: agreement.require(
            world, agreement.of_run(dataclasses.replace(base, data=private), resume=False)
        ),
    }
    for name, ask in asked.items():
        started, text = time.monotonic(), ""
        try:
            ask()
        except UserError as error:
            text = str(error)
        result[name] = {"told": world.gather(text), "seconds": time.monotonic() - started}
    result["files"] = [str(path) for path in folder.rglob("*")]
    return result
