"""The loop: it learns, stops when it should, keeps the best, survives a full disk, evaluates without side effects."""

import dataclasses
import json
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.training import evaluation
from astrobiogen.training import run as whole_run
from astrobiogen.training.batches import loading
from astrobiogen.training.config import CheckpointConfig, OptimizerConfig, PrecisionConfig, StopConfig
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError, UserError
from astrobiogen.training.observe.monitor import read_log
from tests.training.conftest import FEATURES, Run, ToyModel, ToySamples, collate, toy_config, toy_loss, toy_task

MakeRun = Callable[..., Run]
CPU = torch.device("cpu")


def evaluated(model: torch.nn.Module, count: int = 40, batch_size: int = 7, masked: str = "") -> evaluation.Evaluation:
    result = evaluation.evaluate(
        model, toy_loss, ToySamples(count, 9), collate, batch_size=batch_size, device=CPU, masked=masked
    )
    assert result is not None
    return result


# Validation gets worse after the first epoch.
DIVERGING = OptimizerConfig(learning_rate=5.0, ema_decay=0.0)


def test_it_learns_and_the_best_is_kept(make_run: MakeRun, tmp_path: Path) -> None:
    config = toy_config(epochs=25, optimizer=OptimizerConfig(learning_rate=0.05))
    run = make_run(config, task=toy_task(config, train_samples=64))
    assert run.trainer.fit()
    records = read_log(tmp_path / "run" / "log.jsonl")
    losses = [record["validation"]["loss"] for record in records if record["event"] == "epoch"]
    assert run.trainer.progress.best == min(losses) < 0.6 * losses[0]
    path = run.trainer.saver.load_best()
    assert path.parent.name == "best"
    again = evaluation.evaluate(
        run.trainer.model, toy_loss, run.trainer.task.validation, collate, batch_size=16, device=CPU
    )
    assert again is not None
    assert again.loss == min(losses)
    assert evaluated(run.trainer.model).figure("accuracy") > 0.75


def test_the_last_model_is_taken_where_no_figure_chooses(make_run: MakeRun) -> None:
    run = make_run(toy_config(epochs=4, stop=StopConfig(metric="last", patience=1), optimizer=DIVERGING))
    assert run.trainer.fit()
    assert run.trainer.progress.stopped == "all epochs done"
    assert run.trainer.progress.best_epoch == 3
    last = {name: value.clone() for name, value in run.trainer.model.state_dict().items()}
    run.trainer.saver.load_best()
    assert all(torch.equal(value, last[name]) for name, value in run.trainer.model.state_dict().items())


def test_validation_is_the_training_loss_and_batch_size_does_not_matter() -> None:
    torch.manual_seed(0)
    model = ToyModel(dropout=0.5)
    batch = collate([ToySamples(40, 9)[index] for index in range(40)])
    state = runtime.rng_state()
    results = [evaluated(model, batch_size=size) for size in (40, 7, 1)]
    assert torch.equal(state["torch"], torch.get_rng_state())
    assert model.training
    model.eval()
    loss, parts = toy_loss(model(batch), batch)
    for result in results:
        assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert result.parts["classification"] == pytest.approx(float(parts["classification"]), rel=1e-6)


def test_masking_hides_a_modality() -> None:
    torch.manual_seed(0)
    model = ToyModel(dropout=0.0)
    whole, hidden, other = (
        evaluated(model),
        evaluated(model, masked="planet_params"),
        evaluated(model, masked="climate"),
    )
    assert len(set(hidden.predictions.probability.tolist())) == 1  # nothing left to tell samples apart
    assert (whole.predictions.probability == other.predictions.probability).all()
    batch = collate([ToySamples(4, 9)[index] for index in range(4)])
    masked = evaluation.mask_modality(batch, "text")
    assert not masked["attention_mask"].any()
    assert (masked["labels"] == -100).all()
    assert batch["attention_mask"].all()
    assert masked["modality_mask"].tolist() == [[True, True, True, False, True]] * 4
    assert batch["planet_params"].shape[1] == FEATURES


def test_early_stopping_and_target(make_run: MakeRun) -> None:
    frozen = OptimizerConfig(learning_rate=1e-12)
    run = make_run(toy_config(epochs=50, optimizer=frozen, stop=StopConfig(patience=3, metric="accuracy")), "early")
    assert run.trainer.fit()
    assert run.trainer.progress.stopped == "early: no better accuracy for 3 epochs"
    assert run.trainer.progress.epoch == 4
    config = toy_config(
        epochs=80, optimizer=OptimizerConfig(learning_rate=0.05), stop=StopConfig(patience=0, target_accuracy=0.55)
    )
    task = toy_task(config, train_samples=64)
    run = make_run(config, "target", task=dataclasses.replace(task, validation=ToySamples(60, 2)))
    assert run.trainer.fit()
    assert run.trainer.progress.stopped.startswith("target")
    assert run.trainer.progress.epoch < 80


def test_time_limit_ends_inside_an_epoch_and_can_be_raised(make_run: MakeRun) -> None:
    config = toy_config(stop=StopConfig(max_hours=1e-9))
    run = make_run(config)
    assert run.trainer.fit()
    assert run.trainer.progress.stopped.startswith("time limit")
    assert run.trainer.progress.step == 1
    run.monitor.__exit__()
    longer = make_run(toy_config())
    assert longer.trainer.saver.resume()
    assert longer.trainer.fit()
    whole = make_run(toy_config(), "whole")
    whole.trainer.fit()
    expected = whole.trainer.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in longer.trainer.model.state_dict().items())


def test_full_disk_is_reported_and_training_goes_on(make_run: MakeRun, tmp_path: Path) -> None:
    saves: list[str] = []

    def observer(stage: str) -> None:
        saves.append(stage)
        if stage == "before commit" and saves.count(stage) > 3:
            raise OSError(28, "No space left on device")

    run = make_run(toy_config(epochs=4), observer=observer)
    assert run.trainer.fit()
    failures = [record for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "save_failed"]
    assert failures
    assert "No space left" in failures[0]["error"]
    run.monitor.__exit__()
    assert make_run(toy_config(epochs=4)).trainer.saver.resume()


def test_checkpoints_by_epoch_and_pruned(make_run: MakeRun) -> None:
    run = make_run(toy_config(epochs=5, checkpoint=CheckpointConfig(every_epochs=2, every_minutes=0.0, keep=2)))
    run.trainer.fit()
    assert [path.name for path in run.trainer.saver.store.candidates()] == ["step-00000030", "step-00000024"]
    assert len(run.trainer.saver.best_store.candidates()) == 1


def test_other_model_or_data_is_refused(make_run: MakeRun) -> None:
    config = toy_config(epochs=1)
    make_run(config).trainer.fit()
    other = dataclasses.replace(toy_task(config), fingerprint="other")
    with pytest.raises(CheckpointError, match="made with other data"):
        make_run(config, task=other).trainer.saver.resume()
    wider = dataclasses.replace(toy_task(config), model=torch.nn.Sequential(ToyModel()))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        make_run(config, task=wider).trainer.saver.resume()


def test_averaged_weights_are_validated_but_raw_ones_train(make_run: MakeRun) -> None:
    run = make_run(toy_config(epochs=2, optimizer=OptimizerConfig(learning_rate=0.05, ema_decay=0.5)))
    run.trainer.fit()
    average = run.trainer.updater.average
    assert average is not None
    assert average.updates == run.trainer.updater.updates
    raw = run.trainer.model.state_dict()["first.weight"].clone()
    assert not torch.equal(raw, average.averages["first.weight"])
    run.trainer.saver.load_best()
    assert not torch.equal(raw, run.trainer.model.state_dict()["first.weight"])
    assert math.isfinite(evaluated(run.trainer.model).loss)


def test_the_timer_of_saves_runs_across_epochs(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each micro-batch takes 7 minutes by a clock of our own, an epoch of 6 of them 42: saves are 2 hours apart."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("astrobiogen.training.checkpoint.saving.time.monotonic", lambda: clock.now)
    config = toy_config(epochs=8, checkpoint=CheckpointConfig(every_epochs=0, every_minutes=120.0))
    task = toy_task(config)

    def slow(samples: list[Any]) -> Any:
        clock.now += 7 * 60 if len(samples) <= 4 else 0
        return collate(samples)

    run = make_run(config, task=dataclasses.replace(task, collate=slow))
    assert run.trainer.fit()
    saved = [record for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "saved"]
    assert [record["step"] for record in saved if record["why"] == "time"] == [18, 36]  # 126 minutes each


def test_workers_outlive_a_signal_to_the_process_group() -> None:
    """Stopping signals reach loader processes too; every batch must still arrive."""
    parent = os.getpid()

    def signalled(samples: list[Any]) -> Any:
        assert os.getpid() != parent
        for number in runtime.STOPPING:
            os.kill(os.getpid(), number)
        return collate(samples)

    order = [[0, 1], [2, 3], [4]]
    loaded = list(loading.load_batches(ToySamples(5, 1), signalled, order, CPU, workers=1))
    assert [indices for indices, _ in loaded] == order
    for indices, batch in loaded:
        assert torch.equal(batch["planet_params"], ToySamples(5, 1).x[indices])


def test_a_numerical_stop_writes_the_samples_down(make_run: MakeRun, tmp_path: Path) -> None:
    def poisoned(outputs: dict[str, Any], batch: dict[str, Any]) -> Any:
        loss, parts = toy_loss(outputs, batch)
        return loss * math.nan, parts

    config = toy_config(precision=PrecisionConfig(skip_budget=1))
    run = make_run(config, task=dataclasses.replace(toy_task(config), loss_function=poisoned))
    order = list(run.trainer.task.sampler.batches(0))
    with pytest.raises(
        UserError, match=r"2 updates in a row had NaN or Inf gradients.*nonfinite_report\.json"
    ) as caught:
        whole_run._fit(run.trainer)
    assert caught.value.exit_code == 1
    report = json.loads((tmp_path / "run" / "nonfinite_report.json").read_text())
    assert [update["batches"] for update in report["updates"]] == [order[:4], order[4:]]
    assert report["updates"][0]["means"]["loss"] == "nan"


def test_early_stopping_goes_on_counting_after_a_resume(make_run: MakeRun) -> None:
    """All of `Progress` is in the checkpoint; patience ends a resumed run in the epoch in which it ends a whole one."""
    config = toy_config(epochs=12, stop=StopConfig(patience=2), optimizer=DIVERGING)
    whole = make_run(config, "whole")
    whole.trainer.fit()
    assert whole.trainer.progress.stopped.startswith("early: no better")
    first = make_run(config, "part")
    task = first.trainer.task
    seen = 0

    def counting(samples: list[Any]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen == 10:  # in the second epoch
            first.interrupt.received = "SIGTERM"
        return collate(samples)

    first.trainer.task = dataclasses.replace(task, collate=counting)
    assert not first.trainer.fit()
    second = make_run(config, "part")
    assert second.trainer.saver.resume()
    assert second.trainer.progress == dataclasses.replace(
        first.trainer.progress, seconds=second.trainer.progress.seconds
    )
    second.trainer.fit()
    for name in ("epoch", "step", "best", "best_epoch", "bad_epochs", "stopped"):
        assert getattr(second.trainer.progress, name) == getattr(whole.trainer.progress, name), name


def test_a_long_evaluation_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "astrobiogen"):
        evaluated(ToyModel())
        assert caplog.text == ""
        monkeypatch.setattr(evaluation.passes, "_TELL_SECONDS", -1.0)
        evaluated(ToyModel())
    assert "evaluated 5 of 6 batches" in caplog.text
