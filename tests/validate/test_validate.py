"""`python -m astrobiogen.validate`: it covers everything there is, passes, and finds planted faults."""

import json
from pathlib import Path

import pytest
import torch

from astrobiogen import layers as all_layers
from astrobiogen import models as all_models
from astrobiogen import ops
from astrobiogen.validate import curves, layers, models, operators
from astrobiogen.validate.__main__ import main
from astrobiogen.validate.rows import DTYPES

CPU = torch.device("cpu")
PREPARATION = {"EdgeLists", "edge_lists"}  # and all of rope's tables: no kernel computes them


def test_every_operator_layer_and_model_is_compared() -> None:
    names = {name for name in ops.__all__ if not name.startswith("rope_")}
    assert set(operators.OPERATORS) == names - PREPARATION
    assert set(layers.SAMPLES) | set(layers.NO_SAMPLE) == set(all_layers.__all__)
    modules = {
        name for name in all_models.__all__
        if isinstance(kind := getattr(all_models, name), type) and issubclass(kind, torch.nn.Module)
    }  # fmt: skip
    assert set(models.MODELS) == modules - {"AtmosphereBudgets", "RebuiltMultiModalIntegration"}


@pytest.mark.parametrize("name", ["swiglu_packed", "conv_transpose_nd"])
def test_an_operator_passes_in_every_dtype(name: str) -> None:
    for dtype in DTYPES:
        row = operators.check(name, dtype, CPU)
        assert row.ok, row.failures
        assert row.comparisons > 10
        assert 0 < row.forward <= 1
        assert row.backward is not None
        assert 0 < row.backward <= 1


@pytest.mark.parametrize("name", layers.SAMPLES)
def test_every_layer_passes(name: str) -> None:
    for dtype in DTYPES:
        row = layers.check(name, dtype, CPU)
        assert row.ok, row.failures
        assert (row.backward is None) == (name == "RotaryEmbedding")


@pytest.mark.parametrize("name", ["SpectrumEncoder", "RebuiltMultimodalIntegration", "RebuiltGraphVAE"])
def test_models_pass(name: str) -> None:
    row = models.check(name, torch.bfloat16, CPU)
    assert row.ok, row.failures


def test_a_planted_fault_is_found_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    swiglu, cases = operators.OPERATORS["swiglu"]
    monkeypatch.setattr(operators, "plain", lambda _: lambda **arguments: 1.01 * ops.swiglu(**arguments))
    monkeypatch.setattr(operators, "OPERATORS", {"swiglu": (swiglu, cases[:3])})
    assert main(["--only", "op", "--json", "--output", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "validate.json").read_text())
    assert [row["ok"] for row in report["rows"]] == [False] * 3
    assert "exceeds the allowed" in report["rows"][0]["failures"][0]
    assert (tmp_path / "validate.png").stat().st_size > 10_000


def test_training_curves_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--only", "training", "--steps", "3", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("tiny, 3 updates") == 3
    assert "3 of 3 rows right" in said
    report = json.loads((tmp_path / "validate.json").read_text())
    assert {len(losses) for losses in report["curves"].values()} == {3}


def test_a_curve_that_goes_elsewhere_is_wrong() -> None:
    found = {curves.name_of(d, k): [2.0, 1.0 + 0.01 * i] for i, d in enumerate(DTYPES) for k in (False, True)}
    assert all(row.ok for row in curves.judged(found))
    found[curves.name_of(torch.bfloat16, kernels=True)] = [2.0, 1.5]
    assert [row.ok for row in curves.judged(found)] == [True, False, True]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "-1"])
    assert "must be 0 or more" in capsys.readouterr().err
