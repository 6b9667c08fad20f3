"""What a trainer works on and where it stands."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from astrobiogen.training import evaluation, loading, weighting


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        model: `model(batch) -> outputs` with "logits" [B, 2] and "regression" [B].
        loss_function: `(outputs, batch) -> (loss, its terms)`, with a third argument `{term: factor}` if `counts` is
            given.
        counts: (numbers of training samples, those whose text is read) -> how many things each term of the loss is a
            mean over, for terms that are not means over all samples.
        validation_counts: the same for the validation set.
        text_share: share of an update's samples whose text is read.
        every_parameter: the loss of any batch depends on every parameter, whatever its samples lack.
        fingerprint: names the data by their content; a run is only resumed on the same.
        statistics: what a reader of other data needs beside the weights (JSON data); kept with the best model.
        validation_order: batches of the validation set; default: consecutive ones.
        augment: changes a training batch, drawing from PyTorch's global CPU generator only; None: nothing is changed.
    """

    model: nn.Module
    loss_function: evaluation.LossFunction
    train: loading.Samples
    validation: loading.Samples
    sampler: loading.Sampler
    collate: loading.Collate
    fingerprint: str
    validation_order: Sequence[list[int]] | None = None
    counts: weighting.Counts | None = None
    validation_counts: weighting.Counts | None = None
    text_share: float = 1.0
    every_parameter: bool = False
    augment: Callable[[loading.Batch], loading.Batch] | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        epoch, batch: the current epoch and how many of its micro-batches are done.
        step: micro-batches done in all.
        validating: the epoch's training is done, its validation is not.
        seconds: training time over all parts of the run.
        best, best_epoch: validation figure (by `stop.metric`) and epoch of the model that is stored as the best.
        seen: best figure seen, also of a model that could not be stored.
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
