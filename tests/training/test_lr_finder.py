"""The learning-rate range test."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from astrobiogen.training.config import DataConfig, OptimizerConfig
from astrobiogen.training.errors import UserError
from astrobiogen.training.tools import lr_finder
from tests.training.conftest import toy_config, toy_task

CPU = torch.device("cpu")


def test_the_suggestion_trains_and_the_highest_rate_does_not(tmp_path: Path) -> None:
    config = toy_config(data=DataConfig(batch_size=8, accumulation=2), optimizer=OptimizerConfig())
    seen: list[tuple[int, float, float]] = []
    task = toy_task(config, dropout=0.0, train_samples=64)
    result = lr_finder.find(task, config, CPU, torch.float32, lambda *values: seen.append(values))
    assert [number for number, _, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[0][1] == pytest.approx(lr_finder.LOWEST)
    ratios = [after[1] / before[1] for before, after in itertools.pairwise(seen)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert 1e-4 < result.suggestion < 0.5
    lr_finder.publish(result, tmp_path)
    assert json.loads((tmp_path / "lr_finder.json").read_text())["suggestion"] == result.suggestion
    assert (tmp_path / "lr_finder.png").read_bytes().startswith(b"\x89PNG")


def curve(rates: list[float], noise: float) -> list[float]:
    """Flat at 1, falls most at 1e-4, lowest between 2e-3 and 2e-2, explodes beyond."""
    generator = np.random.default_rng(0)
    clean = [1 - 0.8 / (1 + math.exp(-3 * math.log(rate / 1e-4))) + (rate / 5e-2) ** 3 for rate in rates]
    return [loss + noise * generator.standard_normal() for loss in clean]


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
def test_analysis_of_a_known_curve(noise: float) -> None:
    rates = [10 ** (-6 + 6 * number / 99) for number in range(100)]
    result = lr_finder.analyse(rates, curve(rates, noise))
    assert 3e-5 < result.steepest < 4e-4
    assert 1e-4 < result.suggestion < 3e-3
    assert len(result.losses) == len(result.smooth) < 100
    flat = [3.0 + 0.5 * value for value in np.random.default_rng(1).standard_normal(100)]
    for losses in (flat, [1 + 0.01 * number for number in range(100)]):
        with pytest.raises(UserError, match="shows nothing"):
            lr_finder.analyse(rates, losses)
    with pytest.raises(UserError, match="diverged after 3 updates"):
        lr_finder.analyse(rates, [1.0, 1.0, 1.0, math.nan])
