"""Names of what the rooms of the trainer hand to each other."""

from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, Any]
# (outputs, batch[, factors of the terms]) -> (loss, terms); see `batches.weighting.emphasis` for the factors.
LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
