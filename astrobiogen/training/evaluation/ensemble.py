"""Several trained models as one: averaged probabilities, and how far the members are apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from astrobiogen.training.batches import loading
from astrobiogen.training.evaluation import metrics


class Ensemble(nn.Module):
    """Runs every member and averages their class probabilities, fractions and modality weights:
    `logits = log(mean_m softmax(logits_m))`. All other outputs are the first member's.

    Args:
        members: models with the same outputs, at least one.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: got none, expected at least one model")
        self.members = nn.ModuleList(members)

    def forward(self, batch: loading.Batch) -> dict[str, Any]:
        """Outputs of the first member with the averages put in."""
        outputs = [member(batch) for member in self.members]
        logits = torch.stack([output["logits"].double().log_softmax(-1) for output in outputs])
        averaged = {"logits": (logits.logsumexp(0) - np.log(len(outputs))).to(outputs[0]["logits"].dtype)}
        for name in ("regression", "modality_weights"):
            values = [output[name] for output in outputs if output.get(name) is not None]
            if len(values) == len(outputs):
                averaged[name] = torch.stack(values).mean(0)
        return outputs[0] | averaged


def spread(members: Mapping[str, metrics.Predictions]) -> dict[str, Any]:
    """Figures of each member, and the disagreement: the standard deviation of P(class 1) over members, averaged over
    samples, and the share of samples on whose class not all agree.
    """
    probability = np.stack([member.probability for member in members.values()])
    classes = probability >= 0.5
    return {
        "members": {
            name: {figure: float(value[0]) for figure, value in metrics.figures(member).items()}
            for name, member in members.items()
        },
        "mean_standard_deviation": float(probability.std(axis=0, ddof=1).mean()) if len(members) > 1 else 0.0,
        "share_in_dispute": float((classes.any(axis=0) & ~classes.all(axis=0)).mean()),
    }
