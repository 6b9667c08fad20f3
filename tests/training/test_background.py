"""Saves in the background: the same files as saves at once, of the state at the time they were asked for."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.training.checkpoint import CheckpointStore, Content, read
from astrobiogen.training.checkpoint.background import Background, HostCopy, Job
from astrobiogen.training.config import CheckpointConfig, MonitorConfig
from astrobiogen.training.observe.monitor import read_log
from tests.training.conftest import toy_config
from tests.training.test_checkpoint import content

AT_ONCE = CheckpointConfig(every_minutes=1e-9, keep=50)
BEHIND = CheckpointConfig(every_minutes=1e-9, keep=50, asynchronous=True)


def equal(one: Content, other: Content) -> None:
    """Tensors to the bit, and documents."""
    assert one.tensors.keys() == other.tensors.keys()
    for stem, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[stem].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[stem][name]), (stem, name)
    one.documents["training"]["progress"]["seconds"] = other.documents["training"]["progress"]["seconds"]
    one.documents["training"]["config"]["checkpoint"] = other.documents["training"]["config"]["checkpoint"]
    assert one.documents == other.documents


def test_every_checkpoint_is_that_of_a_save_at_once(make_run: Any, tmp_path: Path) -> None:
    """Also where the thread writes only after training has gone on: each save begins late here."""

    def late(stage: str) -> None:
        if stage == "wrote model.safetensors":
            time.sleep(0.03)

    make_run(toy_config(checkpoint=AT_ONCE), "at-once").trainer.fit()
    make_run(toy_config(checkpoint=BEHIND), "behind", observer=late).trainer.fit()
    folders = [sorted((tmp_path / name / "checkpoints").glob("step-*")) for name in ("at-once", "behind")]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]]
    assert len(folders[0]) > 18
    for one, other in zip(*folders, strict=True):
        equal(read(one), read(other))
    best = [read(next((tmp_path / name / "best").glob("step-*"))) for name in ("at-once", "behind")]
    assert all(torch.equal(value, best[1].tensors["model"][name]) for name, value in best[0].tensors["model"].items())


def test_a_copy_is_kept_apart_and_tied_tensors_stay_tied() -> None:
    copy, source = HostCopy(), content(3)
    before = {name: tensor.clone() for name, tensor in source.tensors["model"].items()}
    made = copy(source)
    made_model = made.tensors["model"]
    for tensor in source.tensors["model"].values():
        tensor.zero_()
    assert all(torch.equal(made_model[name], tensor) for name, tensor in before.items())
    assert made_model["tied"].data_ptr() == made_model["a.weight"].data_ptr()
    again = copy(source)  # into the same memory
    assert again.tensors["model"]["a.weight"].data_ptr() == made_model["a.weight"].data_ptr()
    assert not again.tensors["model"]["a.weight"].any()


def test_training_goes_on_while_a_save_is_written_and_the_next_save_waits(
    make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    going, go_on = threading.Event(), threading.Event()

    def observer(stage: str) -> None:
        if stage == "before commit" and not going.is_set():
            going.set()
            assert go_on.wait(60)

    monitor = MonitorConfig(progress="plain", level="WARNING")
    run = make_run(toy_config(checkpoint=CheckpointConfig(every_minutes=0.0, asynchronous=True), monitor=monitor),
                   observer=observer)  # fmt: skip
    saver = run.trainer.saver
    assert saver.save("first")
    assert going.wait(60)
    assert saver.settle(wait=False)  # not done: nothing to report, and no wait
    assert saver.store.candidates() == []
    threading.Timer(1.2, go_on.set).start()
    assert saver.save("second")
    assert "for the checkpoint of step 0, which was still being written" in caplog.text
    assert [path.name for path in saver.store.candidates()] in (
        ["step-00000000"],
        ["step-00000000-r1", "step-00000000"],
    )
    assert saver.settle()
    saved = [record for record in read_log(tmp_path / "run" / "log.jsonl") if record["event"] == "saved"]
    assert [record["why"] for record in saved] == ["first", "second"]
    assert saved[0]["seconds"] >= 1.0
    assert saved[1]["stall"] < saved[0]["stall"]


def test_a_failure_in_the_background_is_told_as_any_other(
    make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def observer(stage: str) -> None:
        if stage == "before commit" and run.trainer.progress.step >= 6:
            raise OSError(28, "No space left on device")

    run = make_run(toy_config(checkpoint=BEHIND), observer=observer)
    assert run.trainer.fit()
    records = read_log(tmp_path / "run" / "log.jsonl")
    failed = [record for record in records if record["event"] == "save_failed"]
    assert failed
    assert "No space left on device" in failed[0]["error"]
    assert "checkpoint NOT saved" in caplog.text
    newest = CheckpointStore(tmp_path / "run" / "checkpoints", 3).load_newest()
    assert newest is not None
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp-*"))


def slow(_stage: str) -> None:
    time.sleep(0.05)


def test_the_end_waits_for_the_last_save(make_run: Any, tmp_path: Path) -> None:
    config = toy_config(epochs=1, checkpoint=CheckpointConfig(every_minutes=0.0, asynchronous=True))
    run = make_run(config, observer=slow)
    assert run.trainer.fit()
    newest = CheckpointStore(tmp_path / "run" / "checkpoints", 3).load_newest()
    assert newest is not None
    assert newest[1].documents["training"]["progress"]["stopped"] != ""


@pytest.mark.parametrize("full", [False, True])
def test_a_signal_waits_and_says_whether_it_was_saved(make_run: Any, tmp_path: Path, full: bool) -> None:
    def observer(stage: str) -> None:
        slow(stage)
        if full and stage == "before commit":
            raise OSError(28, "No space left on device")

    run = make_run(toy_config(checkpoint=CheckpointConfig(every_minutes=0.0, asynchronous=True)), observer=observer)
    run.interrupt.received = "SIGTERM"
    assert not run.trainer.fit()
    (record,) = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["event"] == "interrupted"]
    assert record["saved"] is not full
    found = CheckpointStore(tmp_path / "run" / "checkpoints", 3).load_newest()
    assert (found is None) is full


def test_what_is_not_the_disks_fault_is_raised() -> None:
    background = Background()
    assert background.take(wait=True) is None
    broken: Callable[[], Any] = lambda: 1 / 0  # noqa: E731
    background.start(Job(1, "test", 0.0, time.monotonic()), broken)
    job = background.take(wait=True)
    assert job is not None
    assert isinstance(job.failure, ZeroDivisionError)
    assert job.seconds >= 0


def test_a_background_failure_that_is_a_bug_ends_the_run(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    def observer(_stage: str) -> None:
        raise ZeroDivisionError("a bug")

    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError, match="a bug"):
        make_run(toy_config(checkpoint=BEHIND), observer=observer).trainer.fit()
