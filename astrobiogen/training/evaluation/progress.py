"""Where a run stands."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        epoch, batch: the current epoch and how many of its micro-batches are done.
        step: micro-batches done in all.
        validating: the epoch's training is done, its validation is not.
        seconds: training time over all parts of the run.
        best, best_epoch: validation figure (by `stop.metric`) and epoch of the model that is stored as the best.
        seen: figure from which patience counts, the last that was better than the one before by `stop.min_delta`, also
            of a model that could not be stored.
        bad_epochs: epochs with a defined figure since then.
        stopped: why training ended; empty while it goes on.
        epoch_samples, epoch_sums: for the mean training loss of the current epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    validating: bool = False
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int = -1
    seen: float | None = None
    bad_epochs: int = 0
    stopped: str = ""
    epoch_samples: int = 0
    epoch_sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def load(self, values: dict[str, Any]) -> None:
        """Take over what `dataclasses.asdict` gave."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, values[field.name])

    def begin_epoch(self) -> None:
        """Move to the first batch of the next epoch."""
        self.epoch += 1
        self.validating, self.batch, self.epoch_samples, self.epoch_sums = False, 0, 0, {}
