"""The memory plan against a measured update, and the report when memory runs out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen import train
from astrobiogen.training import run as whole_run
from astrobiogen.training.config import (
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    TrainConfig,
    as_dict,
    parser,
    run_folder,
)
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe import failure
from astrobiogen.training.tools import memory, plan, rehearsal, room
from tests.training.conftest import Run, ToyModel, collate, toy_config, toy_loss, toy_task

MakeRun = Callable[..., Run]
WIDTH = 20_000  # 1 MiB of weights: the fixed few kB of bookkeeping then do not count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
def test_the_plan_is_the_measured_peak(make_run: MakeRun, tmp_path: Path, accumulation: int) -> None:
    config = toy_config(
        epochs=1,
        data=DataConfig(batch_size=8, accumulation=accumulation),
        optimizer=OptimizerConfig(name="adamw", ema_decay=0.9),
    )
    run = make_run(config, task=toy_task(config, train_samples=48, width=WIDTH))
    assert run.trainer.fit()
    report = json.loads((tmp_path / "run" / run_folder.MEMORY).read_text())
    assert report["measured_bytes"].keys() == report["planned_bytes"].keys()
    weights = 4 * sum(value.numel() for value in run.trainer.model.parameters())
    for side in ("planned_bytes", "measured_bytes"):
        assert report[side]["weights"] == weights
        assert report[side]["averaged weights"] == weights  # the tied head once
        assert report[side]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
        assert report[side]["gradients"] == (weights if accumulation > 1 else 0)
        assert report[side]["total"] == sum(value for name, value in report[side].items() if name != "total")
    assert 0.95 < report["measured_over_planned"] < 1.05


def test_measuring_leaves_the_run_alone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for name, due in (("with", None), ("without", lambda *_: False)):
        if due is not None:
            monkeypatch.setattr(memory.MemoryProbe, "due", due)
        run = make_run(toy_config(), name)
        run.trainer.fit()
        states.append(run.trainer.model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def hungry_loss(outputs: dict[str, Any], batch: dict[str, Any]) -> Any:
    """More than any machine has."""
    loss, parts = toy_loss(outputs, batch)
    return loss + torch.empty(2**55).sum(), parts


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_out_of_memory_is_a_report_with_settings(make_run: MakeRun, tmp_path: Path, optimizer: Any) -> None:
    config = toy_config(
        preset="a5000",
        data=DataConfig(batch_size=3, accumulation=2),
        optimizer=OptimizerConfig(name=optimizer, ema_decay=0.9),
    )
    run = make_run(config, task=dataclasses.replace(toy_task(config), loss_function=hungry_loss))
    with pytest.raises(UserError) as caught:
        whole_run._fit(run.trainer)
    assert caught.value.exit_code == 1
    line = str(caught.value)
    assert line.startswith("out of memory on cpu: ")
    assert "\n" not in line
    assert "--data.batch_size 1 --data.accumulation 6 (the same update from smaller parts)" in line
    assert "--model.llm_config.use_gradient_checkpointing true" in line
    assert ("--optimizer.name adamw8bit" in line) == (optimizer == "adamw")
    assert "--optimizer.ema_decay 0" in line
    report = json.loads((tmp_path / "run" / memory.OUT_OF_MEMORY).read_text())
    assert report["bytes_held"]["weights"] == 4 * sum(value.numel() for value in run.trainer.model.parameters())
    assert report["peak"] > 2**20
    assert report["settings"]
    other = RuntimeError("shapes do not fit")
    assert not failure.is_out_of_memory(other)
    assert failure.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert failure.is_out_of_memory(RuntimeError("std::bad_alloc"))


def test_advice_names_only_what_helps() -> None:
    lean = TrainConfig(data=DataConfig(batch_size=1), optimizer=OptimizerConfig(name="adamw8bit"))
    changes = {f"{part}_config": {"use_gradient_checkpointing": True} for part in ("cnn", "graph", "llm")}
    lean = parser.from_dict(as_dict.to_dict(lean) | {"model": changes})
    lean = dataclasses.replace(lean, precision=dataclasses.replace(lean.precision, dtype="bf16"))
    assert memory.advice(lean, {}) == []


def test_verdict_and_the_micro_batch_that_fits() -> None:
    mib = 2**20
    made = plan.Plan(1, 10 * mib, 10 * mib, 20 * mib, 0, 0, 16 * mib, 144 * mib)
    config = TrainConfig(data=DataConfig(batch_size=16))
    assert plan.judge(made, config, 300 * mib) == plan.Verdict("fits", 16)
    assert plan.judge(made, config, 210 * mib).text.startswith("too close to call")
    assert plan.judge(made, config, 100 * mib) == plan.Verdict("does not fit", 5)
    assert plan.judge(made, config, 40 * mib) == plan.Verdict("does not fit", 0)


def test_several_processes_divide_the_plan() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)]))
    config = toy_config(optimizer=OptimizerConfig(name="adamw"))
    whole = dataclasses.replace(plan.state_plan(model, config), batch=100, moving=1000)
    ddp = plan.shared_out(whole, model, config, torch.float32, 2)
    assert ddp.states == whole.weights + whole.gradients + whole.optimizer
    sharded = dataclasses.replace(config, distributed=DistributedConfig(strategy="fsdp2"))
    half = plan.shared_out(whole, model, sharded, torch.float16, 2)
    assert half.weights == whole.weights // 2
    assert half.optimizer == pytest.approx(whole.optimizer / 2, abs=1)
    assert (half.batch, half.moving, half.processes) == (100, 1000, 2)
    block = 64 * 64 + 64
    assert half.exchanged == 4 * block * 2 + 4 * block
    assert plan.shared_out(whole, model, config, torch.float32, 1) == whole


def test_a_rehearsal_finds_the_peak_of_a_model_without_memory() -> None:
    layers, width, rows = 6, 512, 4096
    with torch.device("meta"):
        model = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(layers))
        )

    def loss(outputs: Any, _: Any) -> Any:
        return outputs.sum(), {}

    batch: Any = torch.ones(rows, width)
    tensor, weights = 4 * rows * width, 4 * layers * (width * width + width)
    found = rehearsal.peak_bytes(model, loss, batch, torch.float32, accumulating=True)
    assert found == pytest.approx((layers + 1) * tensor, rel=0.05)  # each result, and a gradient on its way
    alone = rehearsal.peak_bytes(model, loss, batch, torch.float32)
    assert found <= alone <= found + weights
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_does_not_fit_is_refused_before_it_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "machine_memory", lambda: 2**27)
    assert train.main(["--smoke", "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "GiB and there are 0.1; " in said
    assert "--force starts all the same" in said
    assert not (tmp_path / "run").exists()


def test_the_plan_names_the_cheapest_change_and_the_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--plan", "--preset", "tiny", "--memory", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "In 0.2 GiB: does not fit." in said or "In 0.2 GiB: too close" in said
    assert "The cheapest change that fits: --data.batch_size 8 --data.accumulation 2." in said
    assert "hours at the rate of matrix products" in said


def test_smaller_parts_make_the_same_window() -> None:
    for size, parts, limit, expected in (
        (16, 1, 11, (8, 2)),
        (15, 1, 7, (5, 3)),
        (1, 32, 1, (1, 32)),
        (7, 1, 3, (1, 7)),
    ):
        config = TrainConfig(data=DataConfig(batch_size=size, accumulation=parts))
        wanted = "--data.batch_size {} --data.accumulation {}".format(*expected)
        assert plan.same_update(config, limit) == wanted


def test_bytes_are_counted_once() -> None:
    base = torch.zeros(100)
    nested = {"a": base, "b": [base[:10], (torch.zeros(5), None)], "c": 3}
    assert plan.tensor_bytes(nested) == 400 + 20
    model = ToyModel()
    assert plan.tensor_bytes(list(model.parameters())) == 4 * sum(value.numel() for value in model.parameters())
    assert plan.tensor_bytes(collate([(torch.zeros(6), torch.tensor(0), 0)])) > 0
