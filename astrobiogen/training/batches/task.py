"""What a trainer works on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from astrobiogen.training.batches import loading, weighting
from astrobiogen.training.types import Batch, LossFunction


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
    loss_function: LossFunction
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
    augment: Callable[[Batch], Batch] | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
