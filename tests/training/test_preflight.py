"""`doctor --preflight` and `--checklist`: rounds that are carried out, and that find what is wrong."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from astrobiogen import doctor
from astrobiogen.training import config
from astrobiogen.training.config import run_folder
from astrobiogen.training.evaluation import stopping
from astrobiogen.training.tools import preflight
from astrobiogen.training.tools.preflight import Subject, checklist, rounds

# Long ones; what they start is tested by itself in test_distributed_cli, test_resume and test_memory.
SLOW = ("distributed", "whole", "memory", "syntax", "imports")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A run that may stop early or at its target."""
    asked = config.preset("tiny")
    stop = config.StopConfig(metric="class_loss", patience=2, target_accuracy=0.9, max_hours=1.0)
    return Subject(dataclasses.replace(asked, stop=stop), tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def spoilt(tried: Subject, tmp_path: Path) -> Subject:
    """The same with a copy of its short run, to be damaged."""
    other = Subject(tried.config, tmp_path)
    folder = tmp_path / "short"
    shutil.copytree(tried.ran.folder, folder)
    other._ran["short"] = dataclasses.replace(tried.ran, folder=folder)
    return other


def outcome(of: Subject, name: str) -> preflight.Check:
    """One check, carried out on `of`."""
    return rounds._of(name, (preflight.ROUNDS | preflight.MORE)[name], of)


def test_there_are_twenty_rounds_and_those_pass_that_a_short_run_shows(tried: Subject) -> None:
    assert len(preflight.ROUNDS) == 20
    found = [outcome(tried, name) for name in preflight.ROUNDS | preflight.MORE if name not in SLOW]
    assert [check for check in found if check.verdict == "failed"] == []
    assert [check.name for check in found if check.verdict == "warning"] == (
        [] if tried.device.type == "cuda" else ["GPU monitor"]
    )
    assert all(check.found for check in found)
    said = {check.name: check.found for check in found}
    assert "without a better class_loss after 3 of 8 epochs; after 1 hours; at 90% accuracy" in said["early stopping"]


def drop(event: str) -> Callable[[Path], None]:
    """Takes the records of one kind out of a run folder."""

    def change(folder: Path) -> None:
        path = folder / run_folder.RECORDS
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["event"] != event))

    return change


def other_loss(folder: Path) -> None:
    """Another validation loss on record."""
    path = folder / run_folder.RECORDS
    path.write_text(re.sub(r'("validation": {"loss": )[0-9.]+', r"\g<1>9.0", path.read_text()))


def other_seed(folder: Path) -> None:
    """A run with another seed than was asked for."""
    path = folder / run_folder.CONFIG
    path.write_text(path.read_text().replace("\nseed: 0\n", "\nseed: 1\n"))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("training loop", drop("step"), "0 updates, expected 8"),
        ("logging", drop("saved"), "'saved': 0"),
        ("validation loop", other_loss, "loss 9.0 on record"),
        ("consistency", other_seed, "another preset or seed"),
        ("test evaluation", lambda folder: (folder / run_folder.REPORT).write_text(""), "report.html is empty"),
        ("clean-up", lambda folder: (folder / "report.html.tmp-0123abcd").touch(), "report.html.tmp-0123abcd"),
        ("checkpoints", lambda folder: [one.unlink() for one in folder.glob("checkpoints/*/model*")], "model"),
    ],
)
def test_a_round_finds_a_planted_fault(
    spoilt: Subject, name: str, damage: Callable[[Path], object], words: str
) -> None:
    damage(spoilt.ran.folder)
    check = outcome(spoilt, name)
    assert check.verdict == "failed"
    assert words in check.found


def test_a_run_that_would_never_stop_is_found(spoilt: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "reason", lambda *_: "")
    assert outcome(spoilt, "early stopping").found == "ValueError: ended after 8 epochs, expected 3"


def test_a_run_that_fails_is_told_with_its_last_words(tried: Subject, tmp_path: Path) -> None:
    wrong = dataclasses.replace(tried.config, data=dataclasses.replace(tried.config.data, path=str(tmp_path / "none")))
    check = outcome(Subject(wrong, tmp_path), "training loop")
    assert check.verdict == "failed"
    assert "exit status 1: error: data: " in check.found


def test_large_presets_are_tried_with_the_tiny_model(tmp_path: Path) -> None:
    large = Subject(config.preset("a5000x2"), tmp_path)
    short = large.short
    assert (short.preset, short.precision.dtype, short.optimizer.name) == ("tiny", "fp16", "adamw8bit")
    assert (short.data.batch_size, short.data.accumulation, short.distributed.strategy) == (1, 2, "fsdp2")
    assert "a5000x2 is too large to try" in large.stands_in


def test_the_checklist_is_ticked_by_checks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_subject: Subject) -> str:
        raise ValueError("no climate")

    monkeypatch.setattr(rounds, "ROUNDS", {"syntax": lambda _subject: "all compile", "shapes": broken})
    monkeypatch.setattr(rounds, "MORE", {})
    path = tmp_path / "list.md"
    assert doctor.main(["--checklist", str(path), "--json", "--preset", "small"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["shapes"] == {"name": "shapes", "verdict": "failed", "found": "ValueError: no climate"}
    text = path.read_text()
    assert "Preset small, seed 0" in text
    assert "- [x] Sources compile\n  - syntax: ok: all compile\n" in text
    assert "- [ ] Shapes are right\n  - shapes: failed: ValueError: no climate\n" in text
    assert "- [x] Kernels agree" in text


def test_every_box_has_checks_and_every_round_a_box() -> None:
    named = {name for boxes in checklist.BOXES.values() for names in boxes.values() for name in names}
    assert named - {"kernels", "versions"} == (preflight.ROUNDS | preflight.MORE).keys()
    assert sum(map(len, checklist.BOXES.values())) == 21


def test_options_of_a_run_need_a_preflight(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--preset", "tiny"]) == 2
    assert "--preset: no option of doctor without --preflight" in capsys.readouterr().err
    assert doctor.main(["--preflight", "--presett", "tiny"]) == 2
    assert "did you mean --preset?" in capsys.readouterr().err
