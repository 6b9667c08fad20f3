"""Several models as one."""

import dataclasses

import pytest
import torch

from astrobiogen.training import evaluation
from astrobiogen.training.evaluation import ensemble
from tests.training.conftest import ToyModel, ToySamples, collate, toy_loss

CPU = torch.device("cpu")
SAMPLES = ToySamples(30, 9)


def evaluated(model: torch.nn.Module) -> evaluation.Evaluation:
    result = evaluation.evaluate(model, toy_loss, SAMPLES, collate, batch_size=7, device=CPU)
    assert result is not None
    return result


def test_probabilities_are_averaged() -> None:
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(ToyModel())
    alone = [evaluated(member) for member in members]
    together = evaluated(ensemble.Ensemble(members))
    expected = sum(item.predictions.probability for item in alone) / 3
    assert together.predictions.probability == pytest.approx(expected, abs=1e-6)
    assert together.fraction == pytest.approx(sum(item.fraction for item in alone) / 3, abs=1e-6)
    worst = max(item.figure("class_loss") for item in alone)
    assert together.figure("class_loss") < worst  # the logarithm is concave
    one = evaluated(ensemble.Ensemble(members[:1]))
    assert one.predictions.probability == pytest.approx(alone[0].predictions.probability, abs=1e-6)
    with pytest.raises(ValueError, match="members: got none"):
        ensemble.Ensemble([])


def test_spread() -> None:
    base = evaluated(ToyModel()).predictions
    low = dataclasses.replace(base, probability=base.probability * 0 + 0.4)
    high = dataclasses.replace(base, probability=base.probability * 0 + 0.6)
    facts = ensemble.spread({"a": low, "b": high})
    assert facts["mean_standard_deviation"] == pytest.approx(0.1 * 2**0.5)
    assert facts["share_in_dispute"] == 1.0
    assert facts["members"]["a"]["accuracy"] + facts["members"]["b"]["accuracy"] == pytest.approx(1.0)
    assert ensemble.spread({"a": low})["mean_standard_deviation"] == 0.0
