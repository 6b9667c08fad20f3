"""An update that looks wrong is computed again: the same bits blame data or model, other bits the hardware."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.training.config.watch import SpikeConfig
from astrobiogen.training.observe.monitor import read_log
from tests.training.conftest import toy_config, toy_loss, toy_task

ON = SpikeConfig(rerun=True, factor=3.0, window=4)


def verdicts(folder: Path) -> list[tuple[int, str]]:
    records = [record for record in read_log(folder / "log.jsonl") if record["event"] == "rerun"]
    return [(record["step"], record["verdict"]) for record in records]


def weights(run: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.trainer.model.state_dict().items()}


def test_an_ordinary_run_is_the_same_to_the_bit(make_run: Any, tmp_path: Path) -> None:
    off = make_run(toy_config(), "off")
    off.trainer.fit()
    on = make_run(toy_config(spike=ON), "on")
    on.trainer.fit()
    assert all(torch.equal(value, weights(on)[name]) for name, value in weights(off).items())
    assert verdicts(tmp_path / "on") == verdicts(tmp_path / "off") == []


class Faulty:
    """The toy loss, multiplied by a factor at some calls."""

    def __init__(self, wrong: set[int], factor: float) -> None:
        self.wrong, self.factor, self.calls = wrong, factor, 0

    def __call__(self, outputs: dict[str, Any], batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, parts = toy_loss(outputs, batch)
        self.calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.calls in self.wrong:
            loss = loss * self.factor
        return loss, parts


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e4])
def test_a_fault_that_does_not_come_again_is_the_hardwares(
    make_run: Any, tmp_path: Path, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    # An epoch is windows of 4 and 2 micro-batches; call 14 is the second of the third epoch.
    config = toy_config(spike=ON)
    whole = make_run(config, "whole")
    whole.trainer.fit()
    run = make_run(config, task=dataclasses.replace(toy_task(config), loss_function=Faulty({14}, factor)))
    run.trainer.fit()
    assert verdicts(tmp_path / "run") == [(16, "not reproducible: hardware")]
    assert "not reproducible: hardware in process 0 of 1" in caplog.text
    # The second result was right, and taken: as if nothing had happened, dropout included.
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("factor", [float("nan"), 1e4])
def test_a_fault_that_comes_again_is_the_datas(make_run: Any, tmp_path: Path, factor: float) -> None:
    config = toy_config(spike=ON)
    fault = Faulty({14, 18}, factor)  # 18: the same micro-batch of the repetition
    run = make_run(config, task=dataclasses.replace(toy_task(config), loss_function=fault))
    run.trainer.fit()
    assert verdicts(tmp_path / "run") == [(16, "reproducible: data or model")]
    assert run.trainer.updater.skipped == (0 if factor == 1e4 else 1)


def test_a_window_begun_before_a_resume_is_not_judged(make_run: Any, tmp_path: Path) -> None:
    config = toy_config(spike=ON)
    run = make_run(config)
    run.interrupt.received = "SIGTERM"
    run.trainer.fit()
    task = dataclasses.replace(toy_task(config), loss_function=Faulty({1}, float("nan")))
    again = make_run(config, task=task)
    again.trainer.saver.resume()
    again.trainer.fit()
    assert verdicts(tmp_path / "run") == []
    assert again.trainer.updater.skipped == 1
