"""NaN or Inf anywhere, in inputs, weights, predictions or a checkpoint, ends in one line that says where it is."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from astrobiogen import data
from astrobiogen.models.datacube.statistics import ClimateStatistics
from astrobiogen.training import checkpoint, evaluation
from astrobiogen.training import run as whole_run
from astrobiogen.training.batches import assemble
from astrobiogen.training.checkpoint import CheckpointStore, saving
from astrobiogen.training.config import OptimizerConfig, preset
from astrobiogen.training.errors import CheckpointError, NumericalError, UserError
from astrobiogen.training.evaluation import baselines, examination, metrics, nonfinite
from tests.training.conftest import Run, ToyModel, ToySamples, collate, toy_config, toy_loss, toy_task

MakeRun = Callable[..., Run]
CPU = torch.device("cpu")
BAD = (math.nan, math.inf, -math.inf)


def evaluated(model: torch.nn.Module, samples: ToySamples) -> evaluation.Evaluation:
    result = evaluation.evaluate(model, toy_loss, samples, collate, batch_size=5, device=CPU, what="the pass")
    assert result is not None
    return result


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    samples = ToySamples(12, 2)
    samples.x[7, 3] = value
    text = (
        "the pass: predictions for 1 of 12 samples are NaN or Inf; terms not finite: loss, classification, regression; "
        "inputs not finite: planet_params (1 of 6 values) of sample 7 (p3, o2)"
    )
    with pytest.raises(NumericalError, match=f"^{re.escape(text)}$") as caught:
        evaluated(ToyModel(), samples)
    assert caught.value.details["not_finite"]["samples"] == [7]
    assert caught.value.exit_code == 1


def test_a_label_that_is_not_finite_is_named() -> None:
    """The predictions are whole, only the loss is not."""

    def spoilt(samples: list[Any]) -> dict[str, Any]:
        batch = collate(samples)
        batch["habitability_fraction"][[sample[2] == 3 for sample in samples]] = math.nan
        return batch

    with pytest.raises(
        NumericalError, match=r"terms not finite: loss, regression; inputs not finite: habit.*sample 3 "
    ):
        evaluation.evaluate(ToyModel(), toy_loss, ToySamples(12, 2), spoilt, batch_size=5, device=CPU)


def test_weights_that_are_not_finite_are_named() -> None:
    model = ToyModel()
    with torch.no_grad():
        model.first.weight[3, 1] = math.nan
    with pytest.raises(
        NumericalError, match=r"12 of 12 samples.*weights not finite: first\.weight \(1 of 96 values\)$"
    ):
        evaluated(model, ToySamples(12, 2))


def test_the_module_that_overflows_is_named() -> None:
    model = ToyModel()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
        model.head.bias.fill_(3e38)
    with pytest.raises(NumericalError, match=r"weights and inputs are finite; .* come from head \(Linear\)$"):
        evaluated(model, ToySamples(12, 2))


def test_a_learning_rate_without_bounds_ends_in_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    config = toy_config(optimizer=OptimizerConfig(learning_rate=1e30))
    run = make_run(config)
    with pytest.raises(
        UserError, match=r"^validation after epoch 1: .* are NaN or Inf.*nonfinite_report\.json"
    ) as caught:
        whole_run._fit(run.trainer)
    assert caught.value.exit_code == 1
    report = json.loads((tmp_path / "run" / "nonfinite_report.json").read_text())
    assert report["not_finite"]["pass"] == "validation after epoch 1"
    assert report["not_finite"]["origin"]
    assert run.trainer.saver.best_store.candidates() == run.trainer.saver.store.candidates() == []


def test_the_report_of_skipped_updates_says_where_the_nan_comes_from(make_run: MakeRun, tmp_path: Path) -> None:
    config = toy_config(precision=dataclasses.replace(toy_config().precision, skip_budget=0))
    task = toy_task(config)
    bad = next(iter(task.sampler.batches(0)))[2]
    task.train.x[bad, 5] = math.nan  # type: ignore[attr-defined]
    run = make_run(config, task=task)
    with pytest.raises(UserError, match=rf"1 updates in a row.*planet_params \(1 of 6 values\) of sample {bad} "):
        whole_run._fit(run.trainer)
    assert f"sample {bad} " in json.loads((tmp_path / "run" / "nonfinite_report.json").read_text())["origin"]


def test_weights_that_are_not_finite_are_not_saved(make_run: MakeRun) -> None:
    """Saved, they would push the whole checkpoints out one after the other."""
    run = make_run(toy_config(epochs=1))
    assert run.trainer.fit()
    before = run.trainer.saver.store.candidates()
    with torch.no_grad():
        run.trainer.model.first.bias[0] = math.inf
    with pytest.raises(NumericalError, match=r"weights are not finite at step 6: first\.bias \(1 of 16 values\)"):
        run.trainer.saver.save("time")
    assert run.trainer.saver.store.candidates() == before


@pytest.mark.parametrize("stem", ["model", "average", "training"])
def test_a_checkpoint_with_nan_is_refused_by_name(make_run: MakeRun, stem: str) -> None:
    config = toy_config(epochs=1)
    run = make_run(config)
    run.trainer.fit()
    run.monitor.__exit__()
    store = run.trainer.saver.store
    content = checkpoint.read(store.candidates()[0])
    name = next(name for name in content.tensors[stem] if name.endswith("exp_avg" if stem == "training" else "weight"))
    content.tensors[stem][name].view(-1)[0] = math.nan
    path = store.save(99, content)
    with pytest.raises(
        CheckpointError, match=rf"{path.name} holds values that are not finite: {re.escape(name)} \(1 of"
    ):
        make_run(config).trainer.saver.resume()
    if stem == "model":
        with pytest.raises(CheckpointError, match="not finite: first"):
            saving.load_weights(ToyModel(), path, content.tensors["model"])


def test_figures_of_predictions_that_are_not_finite_are_not_figures() -> None:
    for value in BAD:
        probability = np.array([0.2, value, 0.9, 0.4])
        label = np.array([0, 1, 1, 0])
        made = metrics.Predictions(probability, label, np.arange(4), np.arange(4), ("",) * 4)
        assert all(np.isnan(figure).all() for figure in metrics.figures(made, np.ones((3, 4))).values())
        assert metrics.accuracy_lower_bound(made, 0) == 0.0
        with pytest.raises(ValueError, match=r"probability: got .* \(1 of 4\), expected values in \[0, 1\]"):
            metrics.bin_of(probability, 10)


@pytest.fixture(scope="module")
def assembly() -> assemble.Assembly:
    torch.manual_seed(0)
    return assemble.assemble(preset("tiny"), data.synthetic.make_bundle(16, 0))


def test_what_is_not_finite_in_a_climate_reaches_the_loss(assembly: assemble.Assembly) -> None:
    """In any epoch, variable and level, NaN or Inf: the loss shows it, and no index is made of it."""
    task = assembly.task
    batch = task.collate([task.train[index] for index in range(3)])
    assert bool(batch["climate_mask"][:, -1].all())
    for number, value in enumerate(BAD):
        cube = batch["climate_datacube"].clone()
        cube[0, number % 2, 3, -1, -1 - number % 2, 4, 5] = value  # the newest epoch, of which the statistics are taken
        changed = batch | {"climate_datacube": cube}
        with torch.no_grad():
            loss, _ = task.loss_function(task.model(changed), changed)
        assert not torch.isfinite(loss), value


def test_climate_statistics_hand_nan_on() -> None:
    statistics = ClimateStatistics(np.linspace(90.0, -90.0, 9).tolist(), (0, 1), levels=2, thresholds=5)
    cube = torch.randn(3, 2, 4, 2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 2, dtype=torch.bool)
    expected = statistics(cube, mask)
    cube[1, 1, 2, -1, -1, 3, 3] = math.nan
    got = statistics(cube, mask)
    where = got.isnan()
    assert where.nonzero()[:, :3].unique(dim=0).tolist() == [[1, 1, 1]]
    assert where[1, 1, 1].all()
    assert torch.equal(got[~where], expected[~where])


def test_baselines_name_features_that_are_not_finite(
    assembly: assemble.Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = baselines.baseline_inputs

    def spoilt(samples: data.HabitatDataset) -> Any:
        made = inner(samples)
        if samples.name == "train":
            made.flat[2, 5] = math.nan
        return made

    monkeypatch.setattr(baselines, "baseline_inputs", spoilt)
    with pytest.raises(
        NumericalError, match=r"baselines: features of 1 of 16 train samples are NaN or Inf, of the first"
    ):
        examination._baseline_probabilities(assembly.bundle, 0)


def test_a_long_list_of_faulty_tensors_is_cut() -> None:
    bad = {f"t{number}": torch.tensor([math.nan, 1.0]) for number in range(8)}
    assert nonfinite.told(nonfinite.faulty(bad)).endswith("t4 (1 of 2 values) and 3 more")
    assert nonfinite.faulty({"a": torch.tensor([math.inf])}, finite=()) == {}
    assert nonfinite.faulty({"a": torch.tensor([1]), "b": torch.zeros(0)}) == {}


def test_evaluate_refuses_a_checkpoint_with_nan(assembly: assemble.Assembly, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    weights = dict(assembly.task.model.state_dict())
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], math.nan)
    path = store.save(1, checkpoint.Content({"model": weights}, {}))
    with pytest.raises(CheckpointError, match=re.escape(f"not finite: {name} (")):
        saving.load_weights(assembly.task.model, path, checkpoint.read(path).tensors["model"])
