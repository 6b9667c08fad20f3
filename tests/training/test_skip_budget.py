"""How many updates may be skipped for NaN or Inf: in a row, and over the whole run."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from astrobiogen.training.config import PrecisionConfig
from astrobiogen.training.errors import NumericalError
from astrobiogen.training.optim.precision import LossScaler
from astrobiogen.training.update import Updater
from tests.training.conftest import Run, toy_config, toy_loss, toy_task
from tests.training.test_update import poison, updater


def test_nan_updates_in_a_row_stop_the_run() -> None:
    made = updater(4, 1, precision=PrecisionConfig(skip_budget=3))
    for _ in range(3):
        poison(made)
        made.finish()
    poison(made)
    with pytest.raises(NumericalError, match=r"^4 updates in a row.*classification.*\[\[0, 1, 2, 3\]\]"):
        made.finish()


def test_the_budget_of_skipped_updates_is_that_of_the_run_and_outlives_a_resume() -> None:
    """Every second update is bad, so none is in a row with another; the count goes with the checkpoint."""
    made = updater(4, 1, precision=PrecisionConfig(skip_budget=3))

    def pair(one: Updater) -> None:
        for good in (True, False):
            poison(one, good)
            one.finish()

    for _ in range(2):
        pair(made)
    resumed = updater(4, 1, precision=PrecisionConfig(skip_budget=3))
    resumed.load_state_dict(made.state_dict())
    pair(resumed)
    with pytest.raises(NumericalError, match=r"^4 updates of the run had NaN or Inf gradients"):
        pair(resumed)
    made.charged, made.updates = 3, 100  # one in a hundred of those taken is allowed beside the budget
    poison(made)
    assert made.finish().skipped
    poison(made, good=True)
    made.finish()
    poison(made)
    with pytest.raises(NumericalError, match=r"^5 updates of the run"):
        made.finish()


def test_overflows_that_lower_the_loss_scale_are_not_charged_to_the_run() -> None:
    made = updater(4, 1, precision=PrecisionConfig(skip_budget=3))
    made.scaler = LossScaler(PrecisionConfig(initial_scale=8.0, hysteresis=1), torch.float16)
    parameter = next(made.model.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)  # the loss is finite, its gradient is not
    for _ in range(3):
        poison(made, good=True)
        assert made.finish().skipped
    assert (made.scaler.scale, made.charged, made.skipped) == (1.0, 0, 3)
    hook.remove()
    poison(made, good=True)
    made.finish()
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    poison(made, good=True)
    made.finish()
    assert made.charged == 1  # the scale cannot fall any further: it is not the reason
    hook.remove()


def test_a_run_in_which_every_update_was_skipped_is_no_result(make_run: Callable[..., Run]) -> None:
    """Two updates an epoch, all bad and all within the budget: in the end nothing was learnt."""

    def poisoned(outputs: object, batch: object) -> object:
        loss, parts = toy_loss(outputs, batch)  # type: ignore[arg-type]
        return (loss * math.nan if loss.requires_grad else loss), parts

    config = toy_config()
    task = dataclasses.replace(toy_task(config), loss_function=poisoned)
    run = make_run(config, task=task)
    with pytest.raises(NumericalError, match=r"^all 6 updates had NaN or Inf gradients .*; 0 taken"):
        run.trainer.fit()
    run.monitor.__exit__()
    again = make_run(config, task=task)
    assert again.trainer.saver.resume()
    with pytest.raises(NumericalError, match=r"^all 6 updates"):
        again.trainer.fit()
