"""The commands end to end, on a small synthetic data set: outputs, resuming, errors in one line."""

import contextlib
import html.parser
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen import data, evaluate, train
from astrobiogen.system import ownership
from astrobiogen.training.batches import assemble, shared_items
from astrobiogen.training.config import claim, parser
from astrobiogen.training.errors import UserError
from astrobiogen.training.evaluation import comparison
from astrobiogen.training.observe.monitor import read_log
from astrobiogen.training.tools import lr_finder, throughput

OPTIONS = ["--smoke", "--monitor.progress", "plain", "--monitor.level", "WARNING", "--evaluation.bootstrap", "20"]


@pytest.fixture(scope="module")
def bundle() -> data.DatasetBundle:
    return data.synthetic.make_bundle(16, 0)


@pytest.fixture(autouse=True)
def _bundled(bundle: data.DatasetBundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The synthetic data in place of the bundled data; PyTorch's deterministic mode as it was afterwards."""
    monkeypatch.setattr(data, "load_bundled", lambda: bundle)
    mode = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(mode)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bundle: data.DatasetBundle) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_bundled", lambda: bundle)
        assert train.main([*OPTIONS, "--output", str(folder)]) == 0
    return folder


class _Tags(html.parser.HTMLParser):
    """The tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002 - the name is the base class's
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def unbalanced(page: str) -> list[str]:
    """Tags of `page` that are never closed."""
    tags = _Tags()
    tags.feed(page)
    return tags.open


def test_a_run_leaves_everything_behind(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "log.jsonl",
        "train.log",
        "checkpoints",
        "best",
        "metrics.json",
        "report.html",
    } <= names
    result = json.loads((run / "metrics.json").read_text())
    assert set(result["model"]) == {"all", "seen", "new_planet", "new_organism", "new_both"}
    assert set(result["ablation"]) == {"climate", "graph", "spectrum", "text", "planet_params"}
    assert {"majority class", "planet + organism effects", "gradient boosting, all features"} <= set(
        result["baselines"]
    )
    assert "gradient boosting, no near-surface temperature" in result["baselines"]
    assert set(result["control"]["cells"]) == set(result["model"])
    assert "no near-surface temperature" in (run / "report.html").read_text()
    gain = result["baselines"]["planet + organism effects"]["model_minus_baseline_by_cell"]["new_planet"]
    assert gain["auroc"]["low"] <= gain["auroc"]["value"] <= gain["auroc"]["high"]
    assert set(result["against_additive_new_planet"]) == {"accuracy", "auroc", "loss"}
    losses = {name: one["cells"]["all"]["loss"]["value"] for name, one in result["baselines"].items()}
    assert losses[result["against_best_baseline"]["baseline"]] == min(losses.values())
    assert result["seed"] == 0
    assert result["run"]["epochs"] == 2
    for name in ("accuracy", "auroc", "loss"):
        assert {"value", "low", "high"} <= set(result["model"]["all"][name])
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 7
    assert "http" not in page.replace("http-equiv", "")
    assert not unbalanced(page)
    for heading in ("Test figures", "Ablation", "Modality weights", "Training", "Memory", "Environment"):
        assert f"<h2>{heading}</h2>" in page
    environment = json.loads((run / "environment.json").read_text())
    assert environment["libraries"]["torch"] == torch.__version__
    assert environment["kernels"]
    events = [record["event"] for record in read_log(run / "log.jsonl")]
    assert events[0] == "start"
    assert events[-1] == "final"
    assert events.count("epoch") == 2


def test_the_statistics_of_its_data_lie_with_the_model(run: Path, bundle: data.DatasetBundle) -> None:
    for name in ("best", "checkpoints"):
        held = json.loads((max((run / name).glob("step-*")) / "data.json").read_text())
        assert held == bundle.statistics()
    assert data.DataSpec.from_json(json.dumps(held["spec"])) == bundle.spec
    settings = parser.from_dict({"data": {"path": str(data.SAMPLE_FOLDER), "limit": 8}})
    with pytest.raises(UserError, match=r"spec\.json \[levels\]: is .* the model was trained on"):
        assemble.load_bundle(settings, bundle.statistics())  # the synthetic data lie on other axes than the real pack


def test_evaluate_repeats_the_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "again"
    assert evaluate.main([str(run), "--output", str(output), "--no-ablation", "--no-baselines"]) == 0
    expected, got = (json.loads((folder / "metrics.json").read_text()) for folder in (run, output))
    assert got["model"] == expected["model"]
    assert "ablation" not in got
    assert "Test set" in capsys.readouterr().out
    newest = max((run / "checkpoints").glob("step-*"))
    assert evaluate.main([str(newest), "--no-ablation", "--no-baselines", "--bootstrap", "0"]) == 0


def test_resuming_a_finished_run_reports_again(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.json").unlink()
    newest = max((copy / "checkpoints").glob("step-*")) / "model.safetensors"
    newest.write_bytes(
        newest.read_bytes()[:-7]
    )  # a torn newest checkpoint: the epoch is trained again from the one before
    assert train.main(["--resume", str(copy), "--evaluation.ablation", "false", "--evaluation.baselines", "false"]) == 0
    expected, got = (json.loads((folder / "metrics.json").read_text())["model"] for folder in (run, copy))
    assert got == expected
    assert "falling back to an older one" in (copy / "train.log").read_text()


def test_signal_saves_and_ends_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = shared_items.collate_shared
    calls = 0

    def collate(samples: Any, pad_id: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(samples, pad_id)

    monkeypatch.setattr(shared_items, "collate_shared", collate)
    before = signal.getsignal(signal.SIGTERM)
    assert train.main([*OPTIONS, "--output", str(tmp_path / "run")]) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("ablation", ["true", "false"])
def test_signal_while_examining_ends_cleanly_and_resuming_examines_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ablation: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    expected = json.loads((copy / "metrics.json").read_text())["model"]
    (copy / "metrics.json").unlink()
    name = "ablate" if ablation == "true" else "by_cell"
    inner = getattr(comparison, name)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return inner(*arguments)

    options = ["--resume", str(copy), "--evaluation.baselines", "false", "--evaluation.ablation", ablation]
    with monkeypatch.context() as patch:
        patch.setattr(comparison, name, interrupted)
        assert train.main(options) == 75
    assert f"stopped by SIGINT while examining the trained model; do that again with: --resume {copy}" in (
        capsys.readouterr().err
    )
    assert not (copy / "metrics.json").exists()
    assert train.main([*options[:-1], "false"]) == 0
    assert json.loads((copy / "metrics.json").read_text())["model"] == expected


def test_evaluate_stopped_by_a_signal_writes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = comparison.by_cell

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    monkeypatch.setattr(comparison, "by_cell", interrupted)
    options = [str(run), "--output", str(tmp_path / "again"), "--no-ablation", "--no-baselines"]
    assert evaluate.main(options) == 1
    assert one_error_line(capsys) == "error: stopped by SIGTERM: nothing was written"
    assert not (tmp_path / "again").exists()


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_errors_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(code: int, text: str, arguments: list[str], command: Any = train.main) -> None:
        assert command(arguments) == code
        assert text in one_error_line(capsys)

    check(2, "is not an empty folder", ["--output", str(run)])
    check(2, "does not accept option", ["--config", str(_write(tmp_path / "c.yaml", "data: {pth: x}\n"))])
    check(2, "no such folder", ["--resume", str(tmp_path / "nowhere")])
    check(2, "--processes: got -2, expected 0 or more", ["--plan", "--processes", "-2"])
    check(2, "memory: expected float, got nan", ["--plan", "--memory", "nan"])
    check(2, "output: holds one str, no key dir", ["--output.dir", str(tmp_path / "c")])
    check(2, "so this is not the folder of a run", ["--resume", str(tmp_path)])
    check(1, "data: ", ["--data.path", str(tmp_path / "nowhere"), "--output", str(tmp_path / "a")])
    check(
        2, "unrecognized arguments: --model.no_such_key", ["--model.no_such_key", "1", "--output", str(tmp_path / "b")]
    )
    file = _write(tmp_path / "file", "x")
    check(2, "cannot be written", ["--output", str(file / "inside")])
    check(2, "no such folder", [str(tmp_path / "nowhere")], evaluate.main)
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    for path in (*broken.glob("checkpoints/step-*/model.safetensors"), *broken.glob("best/step-*/model.safetensors")):
        path.write_bytes(b"")
    check(1, "is whole", ["--resume", str(broken)])
    check(1, "is whole", [str(broken)], evaluate.main)
    monkeypatch.setattr(throughput, "measure", lambda *_: 1 / 0)
    check(1, "internal: ZeroDivisionError", ["--output", str(tmp_path / "crash")])
    assert "Traceback" in (tmp_path / "crash" / "crash.log").read_text()


def test_a_folder_in_use_or_not_writable_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim.resumed(run):
        assert train.main(["--resume", str(run)]) == 1
    assert "another process is training in this folder" in one_error_line(capsys)
    assert train.main(["--output", "/proc/run"]) == 2
    assert "--output: /proc/run cannot be written" in one_error_line(capsys)

    def refuse(path: Path, *_: Any) -> Any:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:  # root may write anywhere: the refusal of a read-only medium is made here
        patch.setattr(ownership.os, "open", refuse)
        assert train.main(["--resume", str(run)]) == 1
    assert "cannot be written: Read-only file system" in one_error_line(capsys)


def test_evaluating_an_ensemble(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = min((run / "checkpoints").glob("step-*"))
    output = tmp_path / "together"
    options = ["--output", str(output), "--no-ablation", "--no-baselines", "--bootstrap", "0"]
    assert evaluate.main([str(run), str(older), *options]) == 0
    assert "Ensemble of 2: P(class 1) differs by" in capsys.readouterr().out
    result = json.loads((output / "metrics.json").read_text())
    assert set(result["ensemble"]["members"]) == {str(run), str(older)}
    assert "total_loss" not in result


def test_evaluating_a_run_writes_nothing_into_it(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "best" / "step-00000099.tmp-abc").mkdir()  # a save that is going on

    def listing() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in copy.rglob("*"))

    before = listing()
    assert evaluate.main([str(copy), "--no-ablation", "--no-baselines", "--bootstrap", "0"]) == 0
    assert listing() == before


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_learning_rate_finder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = lr_finder.find

    def few_updates(*arguments: Any) -> lr_finder.RangeTest:
        with contextlib.suppress(UserError):  # so few show nothing
            inner(*arguments)
        return lr_finder.RangeTest([1e-3, 1e-2], [1.0, 0.5], [1.0, 0.5], 1e-2, 1e-3)

    monkeypatch.setattr(lr_finder, "UPDATES", 3)
    monkeypatch.setattr(lr_finder, "find", few_updates)
    assert train.main([*OPTIONS, "--find-lr", "--output", str(tmp_path / "lr")]) == 0
    assert "Suggested peak: --optimizer.learning_rate 1.0e-03" in capsys.readouterr().out
    assert {"lr_finder.json", "lr_finder.png"} <= {path.name for path in (tmp_path / "lr").iterdir()}


@pytest.mark.parametrize(
    "wrong", [["--data.path", "/nonexistent"], ["--model.cnn_config.dept", "3"]], ids=["no data", "unknown key"]
)
def test_a_run_that_never_began_leaves_no_folder(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main([*OPTIONS, *wrong, "--output", str(folder)]) != 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not folder.exists()
