"""What all parts of a run share."""

import dataclasses
from pathlib import Path

import torch

from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed import World
from astrobiogen.training.observe import Monitor


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a model is trained or examined by, and on.

    Attributes:
        config: of the run; of one that is over, what it was trained with.
        device: of the model and its batches.
        dtype: of the forward pass.
        world: the processes that share the work.
    """

    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    world: World = dataclasses.field(default_factory=World, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Run(Setting):
    """A setting with a place.

    Attributes:
        folder: the run folder, the same in each process.
        monitor: the records of this process.
    """

    folder: Path
    monitor: Monitor
