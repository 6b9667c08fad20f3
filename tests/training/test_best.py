"""The best model is the one that was stored, whatever the disk did, and the end of a run does not depend on there being
one.
"""

import dataclasses
import datetime
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from astrobiogen import data, evaluate, train
from astrobiogen.training import evaluation
from astrobiogen.training.checkpoint import CheckpointStore, chosen, verify
from astrobiogen.training.config import StopConfig
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.evaluation import metrics, stopping, undefined
from astrobiogen.training.evaluation.progress import Progress
from astrobiogen.training.observe.monitor import read_log
from tests.training.conftest import Run, toy_config

MakeRun = Callable[..., Run]
FULL = OSError(28, "No space left on device")


def full_for_best(run: Run, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Let the n-th attempt (from 1) to store a best model of `run` fail where `fails(n)`."""
    store, attempts = run.trainer.saver.best_store, 0
    inner = store.save

    def save(*arguments: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if fails(attempts):
            raise FULL
        return inner(*arguments)

    monkeypatch.setattr(store, "save", save)


def figures(*losses: float) -> Iterator[evaluation.Evaluation]:
    """Validations with these losses."""
    made = metrics.Predictions(np.array([0.2, 0.8]), np.array([0, 1]), np.arange(2), np.arange(2), ("", ""))
    for loss in losses:
        yield evaluation.Evaluation(made, np.zeros(2), np.zeros(2), loss, {}, {})


def test_the_state_moves_after_the_write(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every epoch's model is better than the one before; from the second on none can be stored."""
    run = make_run(toy_config(epochs=3, stop=StopConfig(metric="last")))
    full_for_best(run, monkeypatch, lambda attempt: attempt > 1)
    assert run.trainer.fit()
    progress = run.trainer.progress
    assert progress.best_epoch == 0
    records = read_log(tmp_path / "run" / "log.jsonl")
    epochs = [record for record in records if record["event"] == "epoch"]
    assert [record["best"] for record in epochs] == [True, False, False]
    assert progress.best == epochs[0]["validation"]["class_loss"]
    taken = run.trainer.saver.load_final()
    assert (taken.kind, taken.epoch, taken.reason) == (chosen.BEST, 1, "")
    held = run.trainer.saver.store.load_newest()
    assert held is not None
    assert held[1].documents["training"]["progress"]["best_epoch"] == 0


def test_a_better_model_that_could_not_be_stored_counts_for_patience_only() -> None:
    progress, stop = Progress(), StopConfig(metric="loss")
    told = []
    for number, result in enumerate(figures(1.0, 0.5, 0.7, 0.8, 0.4)):
        progress.epoch = number
        better = stopping.judge(progress, stop, result)
        stopping.enter(progress, stop, result, stored=better and number != 1)
        told.append((better, progress.best, progress.best_epoch, progress.bad_epochs))
    assert told == [
        (True, 1.0, 0, 0),
        (True, 1.0, 0, 0),  # not stored: the best stays, but the run is getting on
        (True, 0.7, 2, 1),  # better than what is stored, not than what was seen
        (False, 0.7, 2, 2),
        (True, 0.4, 4, 0),
    ]


def test_a_figure_that_is_not_defined_ends_no_run() -> None:
    progress, stop = Progress(), StopConfig(metric="auroc", patience=2)
    made = metrics.Predictions(np.array([0.2, 0.8]), np.array([1, 1]), np.arange(2), np.arange(2), ("", ""))
    result = evaluation.Evaluation(made, np.zeros(2), np.zeros(2), 1.0, {}, {})
    for _ in range(5):
        assert not stopping.judge(progress, stop, result)
        stopping.enter(progress, stop, result, stored=False)
    assert (progress.best, progress.bad_epochs) == (None, 0)
    assert stopping.reason(progress, toy_config(stop=stop, epochs=9), made) == ""


def test_with_no_best_model_the_newest_whole_checkpoint_is_examined(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(toy_config(epochs=2))
    full_for_best(run, monkeypatch, lambda _attempt: True)
    assert run.trainer.fit()
    assert run.trainer.progress.best is None
    average = run.trainer.updater.average
    assert average is not None
    expected = {name: value.clone() for name, value in average.averages.items()}
    with caplog.at_level("WARNING", "astrobiogen"):
        taken = run.trainer.saver.load_final()
    assert taken.facts() == {
        "kind": chosen.OTHER,
        "checkpoint": "step-00000012",
        "epoch": 2,
        "reason": f"{run.trainer.saver.best_store.root} holds no checkpoint",
    }
    assert "holds no checkpoint; taken instead: the newest whole checkpoint" in caplog.text
    got = run.trainer.model.state_dict()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())  # as validation saw them
    with pytest.raises(CheckpointError, match=r"best holds no checkpoint$"):
        run.trainer.saver.load_best()


def test_a_damaged_best_model_falls_back_and_nothing_at_all_is_an_error(make_run: MakeRun) -> None:
    run = make_run(toy_config(epochs=1))
    assert run.trainer.fit()
    saver = run.trainer.saver
    (saver.best_store.candidates()[0] / "model.safetensors").write_bytes(b"")
    taken = saver.load_final()
    assert taken.kind == chosen.OTHER
    assert "is whole" in taken.reason
    shutil.rmtree(saver.store.candidates()[0])
    with pytest.raises(CheckpointError, match=r"is whole, and neither does .*checkpoints"):
        saver.load_final()


def test_the_figures_name_the_epoch_of_the_weights_that_were_loaded(make_run: MakeRun) -> None:
    """Also where the run remembers another epoch: killed between storing the best model and the checkpoint."""
    run = make_run(toy_config(epochs=1))
    assert run.trainer.fit()
    run.trainer.progress.best_epoch = 7
    assert run.trainer.saver.load_final().epoch == 1


@pytest.mark.parametrize(
    ("labels", "missing"),
    [([0, 0, 0], ("balanced_accuracy", "auroc")), ([0, 1], ()), ([1], ("balanced_accuracy", "auroc"))],
)
def test_undefined_figures_follow_from_the_labels(labels: list[int], missing: tuple[str, ...]) -> None:
    assert undefined.figures(np.array(labels)) == missing


def _one_class(samples: data.HabitatDataset) -> data.HabitatDataset:
    pairs = [dataclasses.replace(pair, label=1, fraction=0.9) for pair in samples.pairs]
    return data.HabitatDataset(samples.store, pairs, samples.name)


@pytest.fixture
def one_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Synthetic data in place of the bundled data, with one class in the validation split."""
    bundle = data.synthetic.make_bundle(16, 0)
    bundle = dataclasses.replace(bundle, validation=_one_class(bundle.validation))
    monkeypatch.setattr(data, "load_bundled", lambda: bundle)
    mode = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(mode)


OPTIONS = [
    "--smoke", "--epochs", "1", "--monitor.progress", "plain", "--evaluation.bootstrap", "0",
    "--evaluation.baselines", "false", "--evaluation.ablation", "false", "--stop.metric", "auroc",
]  # fmt: skip


@pytest.mark.usefixtures("one_class")
def test_a_run_without_a_best_model_ends_with_figures_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main([*OPTIONS, "--output", str(run)]) == 0
    printed = capsys.readouterr()
    log = (run / "train.log").read_text()
    before, _, after = log.partition("epoch 1/1")
    assert "validation: not defined, since all 4 samples are of class 1: balanced_accuracy, auroc" in before
    assert "stop.metric auroc is not defined on the validation set: it chooses no best model" in before
    assert "taken instead: the newest whole checkpoint" in after
    assert "Not the best model (" in printed.out
    facts = json.loads((run / "metrics.json").read_text())["run"]
    assert facts["best_epoch"] is None
    assert facts["weights"]["checkpoint"] == CheckpointStore(run / "checkpoints", 2).candidates()[0].name
    assert facts["weights"]["reason"].endswith("best holds no checkpoint")
    assert "which stands in for the best model" in (run / "report.html").read_text()
    assert evaluate.main([str(run), "--no-baselines", "--no-ablation", "--bootstrap", "0"]) == 0
    assert "Not the best model (" in capsys.readouterr().out


def test_a_whole_run_says_nothing_of_undefined_figures(caplog: pytest.LogCaptureFixture) -> None:
    bundle = data.synthetic.make_bundle(64, 0)
    assert all(len(set(samples.labels().tolist())) == 2 for samples in (bundle.validation, bundle.test))
    whole = dataclasses.replace(bundle, test_cells={"seen": bundle.test})
    with caplog.at_level("INFO", "astrobiogen"):
        undefined.tell(whole, StopConfig(metric="auroc"))
    assert caplog.text == ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Stands in for an evaluation: every figure is this one."""

    value: float

    def figure(self, _: str) -> float:
        return self.value


@pytest.mark.parametrize(("metric", "sign"), [("loss", 1.0), ("auroc", -1.0)])
def test_patience_counts_from_the_last_figure_that_was_better_by_min_delta(metric: Any, sign: float) -> None:
    """0.05 and 0.1 are no improvement by more than 0.125, 0.2 is; the best is stored all the same."""
    figures = [1.0, 0.95, 0.9, 0.8, 0.75]
    for min_delta, expected in ((0.0, [0, 0, 0, 0, 0]), (0.125, [0, 1, 2, 0, 1])):
        stop, progress = StopConfig(metric=metric, min_delta=min_delta), Progress()
        counted = []
        for value in figures:
            result: Any = Figure(sign * value)
            stopping.enter(progress, stop, result, stored=stopping.judge(progress, stop, result))
            counted.append(progress.bad_epochs)
        assert counted == expected
        assert progress.best == sign * 0.75
    with pytest.raises(ValueError, match=r"stop\.min_delta"):
        StopConfig(min_delta=-0.1)


def test_every_checkpoint_says_when_it_was_saved_and_the_last_figures(make_run: MakeRun) -> None:
    run = make_run(toy_config(epochs=2))
    run.trainer.fit()
    saver = run.trainer.saver
    for store in (saver.store, saver.best_store):
        manifest = verify(store.candidates()[0])
        saved = datetime.datetime.fromisoformat(manifest["saved"])
        assert abs((datetime.datetime.now(datetime.UTC) - saved).total_seconds()) < 600
        assert set(manifest["metrics"]) == {"train", "validation"}
        assert all(math.isfinite(manifest["metrics"][part]["loss"]) for part in manifest["metrics"])
