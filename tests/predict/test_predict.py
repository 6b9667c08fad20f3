"""Answers for files that have no label: what is read, what is refused, what is said of it, what is left behind."""

import csv
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import astrobiogen
from astrobiogen import data, predict
from astrobiogen.data.climates import cubes
from astrobiogen.data.storage.pack import open_pack
from astrobiogen.predict import Prediction, Predictions, TrainedModel, reading
from astrobiogen.predict.__main__ import main
from astrobiogen.training.errors import UserError
from tests.data.raw_files import VOLUME, climate, network

Options = Callable[..., list[str]]


@pytest.fixture(scope="session")
def model(runs: list[Path]) -> TrainedModel:
    return astrobiogen.load_model(runs[0], device="cpu")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_good_files_are_answered_and_the_bad_ones_named(
    runs: list[Path], files: Path, asked: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    output = files / "out" / "table.csv"
    assert main([str(runs[0]), *asked("--output", str(output))]) == 1
    rows = table(output)
    assert len(rows) == 4 * 3
    for row in rows:
        bad = [name for name in (row["climate"], row["network"]) if "half" in name]
        assert (row["flag"] == "refused") == bool(bad)
        assert all(name in row["reason"] for name in bad)
        if bad:
            assert row["probability"] == row["share"] == row["low"] == row["interval"] == ""
        else:
            assert 0.0 <= float(row["low"]) <= float(row["high"]) <= 1.0
            assert 0.0 < float(row["probability"]) < 1.0
            assert 0.0 <= float(row["share"]) <= 1.0
            assert row["interval"].startswith("Venn-Abers calibration on 8 ")
    # a chain of twelve reactions is like no organism's metabolism, and that is said
    assert all("composition of the network" in row["reason"] for row in rows if row["flag"] == "outside")
    assert {row["flag"] for row in rows} == {"outside", "refused"}
    said = capsys.readouterr().out
    assert "half.nc" in said
    assert "half.json.gz" in said
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in output.parent.iterdir()} == {"table.csv", "table.png"}, "nothing else is left"


def test_exit_status_without_bad_files_and_without_good_ones(runs: list[Path], tmp_path: Path) -> None:
    climate(0.0, 1).to_netcdf(tmp_path / "c.nc", engine="netcdf4")
    (tmp_path / "n.json").write_bytes(network(12, True))
    (tmp_path / "page.json").write_text("<html></html>")
    output = ["--output", str(tmp_path / "p.csv"), "--device", "cpu"]
    names = {"--climates": "c.nc", "--networks": "n.json"}
    good = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert main([str(runs[0]), *good, *output]) == 0
    assert main([str(runs[0]), *good[:-1], str(tmp_path / "page.json"), *output]) == 2
    assert table(tmp_path / "p.csv")[0]["flag"] == "refused"
    assert main([str(tmp_path / "no_run"), *good, *output]) == 2


def test_the_model_reads_a_file_as_it_reads_the_pack(model: TrainedModel, tmp_path: Path) -> None:
    pack = open_pack(data.SAMPLE_FOLDER)
    row = next(row for row in pack.climates if row.planet == "ross128b")
    shape = (12, 10, 32, 64)
    codes = cubes.read_codes(pack.contents(row.cube_file), shape)
    fields = {n: (VOLUME, cubes.value_table(n, int(c.max()) + 1)[c], {"units": u}) for (n, c), u in
              zip(codes.items(), ("K", "1"))}  # fmt: skip
    example = climate(0.0, 1)
    path = tmp_path / f"ross128b_g{row.epoch}.nc"
    xr.Dataset(fields, example.drop_vars(list(example.data_vars)).coords, example.attrs).to_netcdf(path)
    given = reading.read([path], [], model._statistics, 1, None)
    found = given.store.planets[str(path)].epochs[-1]
    expected = data.load_bundled().test[0].epochs.cubes.get(row.cube_file)  # type: ignore[attr-defined]
    assert not given.refused
    assert found is not None
    assert torch.equal(found, expected)


def test_earlier_epochs_that_are_given_are_the_history_of_later_ones(model: TrainedModel, files: Path) -> None:
    found = model.predict([files / "climates"], [files / "networks/a.json"])
    history = {Path(row.climate).name: row.history for row in found.rows}
    assert history["new_g1.nc"] == str(files / "climates/new_g0.nc")
    assert history["new_g0.nc"] == history["mine.zarr"] == ""


def test_an_answer_does_not_depend_on_the_other_files(model: TrainedModel, files: Path) -> None:
    together = model.predict([files / "climates"], [files / "networks"])
    alone = model.predict([files / "climates/mine.zarr"], [files / "networks/b.json.gz"])
    row = next(row for row in together.rows if (row.climate, row.network) == (alone.rows[0].climate,
                                                                              alone.rows[0].network))  # fmt: skip
    for name, value in dataclasses.asdict(alone.rows[0]).items():
        other = getattr(row, name)
        assert other == value if isinstance(value, str) else math.isclose(other, value, rel_tol=1e-4), name


def test_several_runs_are_an_ensemble(runs: list[Path], files: Path) -> None:
    place, organism = [files / "climates/new_g0.nc"], [files / "networks/a.json"]
    each = [astrobiogen.load_model(run, device="cpu").predict(place, organism).rows[0].probability for run in runs]
    found = astrobiogen.load_model(runs, device="cpu").predict(place, organism)
    assert found.interval == "range of 2 runs"
    row = found.rows[0]
    assert math.isclose(row.probability, sum(each) / 2, rel_tol=1e-5)
    assert np.allclose((row.low, row.high), (min(each), max(each)), rtol=1e-5)


def test_pairs_are_answered_in_their_order_and_an_unknown_one_is_refused(
    runs: list[Path], files: Path, asked: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, output = files / "pairs.csv", files / "p.csv"
    pairs.write_text("\ufeffclimate,network\nnew_g1.nc,b.json.gz\nmine.zarr,a.json\n", encoding="utf-8")
    assert main([str(runs[0]), *asked("--pairs", str(pairs), "--output", str(output))]) == 0
    assert [Path(row["climate"]).name for row in table(output)] == ["new_g1.nc", "mine.zarr"]
    before = output.read_bytes()
    pairs.write_text("climate,network\nnew_g9.nc,a.json\n")
    assert main([str(runs[0]), *asked("--pairs", str(pairs), "--output", str(output))]) == 2
    assert "new_g9.nc" in capsys.readouterr().err
    pairs.write_text("planet,network\nx,a.json\n")
    assert main([str(runs[0]), *asked("--pairs", str(pairs), "--output", str(output))]) == 2
    assert "column climate absent" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_table_that_is_not_finished_never_takes_the_place_of_another(tmp_path: Path) -> None:
    class Stopped(list):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield Prediction("a.nc", "b.xml", 0.5)
            raise KeyboardInterrupt

    path = tmp_path / "p.csv"
    Predictions([Prediction("a.nc", "b.xml", 0.25)], "range of 2 runs", {}).write_csv(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        Predictions(Stopped(), "range of 2 runs", {}).write_csv(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_training_data_nothing_is_claimed(
    model: TrainedModel, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dataclasses.replace(model._config.data, path=str(files / "gone"))
    monkeypatch.setattr(model, "_config", dataclasses.replace(model._config, data=gone))
    found = model.predict([files / "climates/new_g0.nc"], [files / "networks/a.json"])
    assert found.rows[0].flag == "unknown"
    assert found.interval == "none: training data not found"
    assert math.isnan(found.rows[0].low)
    assert 0.0 < found.rows[0].probability < 1.0


def test_the_tensors_only_forward_can_be_exported(model: TrainedModel) -> None:
    samples = data.load_bundled().test
    first, second = (model.inputs([samples[k] for k in numbers]) for numbers in ((0, 1), (0, 1)))
    second["planet_params"] = second["planet_params"] + 0.5
    with torch.no_grad():
        exported = torch.export.export(model, (first,), strict=False).module()
        for inputs in (first, second):
            expected, found = model(inputs), exported(inputs)
            assert set(found) == set(expected) == {"probability", "share", "probabilities"}
            assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


def test_the_weights_are_the_checkpoint_s_safetensors(model: TrainedModel, runs: list[Path]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    stored = safetensors.load_file(runs[0] / "model.safetensors")
    held = {name.removeprefix("_members.0."): value for name, value in model.state_dict().items()}
    assert {name for name in stored if not torch.equal(stored[name], held[name])} == set()


def test_members_of_an_ensemble_share_their_data(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        astrobiogen.load_model([runs[0], tmp_path / "none"], device="cpu")
    with pytest.raises(UserError, match="got no folder"):
        astrobiogen.load_model([])


def test_a_missing_package_is_one_line_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xarray" else find(name))
    assert main(["run", "--climates", "a.nc", "--networks", "b.xml"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "error: astrobiogen.predict needs the package xarray: pip install 'astrobiogen[data]'"
    with pytest.raises(ModuleNotFoundError, match=r"astrobiogen\[data\]"):
        _ = predict.load_model
