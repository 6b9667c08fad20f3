"""Whose a run folder is: of several processes one, by name, and nobody touches what is another's."""

import datetime
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astrobiogen.system import ownership
from astrobiogen.training.config import claim, run_folder
from astrobiogen.training.errors import UserError

FORK = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[[int], str]) -> list[str]:
    """What `work(number)` returns in each of `count` processes that start it at the same moment."""
    gate, answers = FORK.Barrier(count), FORK.SimpleQueue()

    def one(number: int) -> None:
        gate.wait(30)
        answers.put((number, work(number)))

    processes = [FORK.Process(target=one, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    got = dict(answers.get() for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [got[number] for number in range(count)]


def snapshot(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Content and time of change of everything below `folder`."""
    return {
        str(path.relative_to(folder)): (None if path.is_dir() else path.read_bytes(), path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def test_runs_without_a_name_that_begin_in_one_second_get_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 11, 24, 10, 15, tzinfo=tz)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claim.datetime, "datetime", Clock)

    def work(number: int) -> str:
        with claim.claimed("", "tiny") as owned:
            (owned.folder / "config.yaml").write_text(str(number))
            return str(owned.folder)

    names = in_processes(6, work)
    assert len(set(names)) == 6
    assert {Path(name).name for name in names} == {
        "20261124-101500-tiny", *(f"20261124-101500-tiny-{number}" for number in range(2, 7))
    }  # fmt: skip
    assert [(tmp_path / name / "config.yaml").read_text() for name in names] == list("012345")


def test_of_several_with_one_output_one_owns_it_and_the_others_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    done = FORK.Barrier(6)

    def work(number: int) -> str:
        try:
            with claim.claimed(str(folder), "tiny"):
                (folder / "config.yaml").write_text(str(number))
                (folder / "log.jsonl").write_text(str(number))
                done.wait(30)
                return f"owner {os.getpid()}"
        except UserError as error:
            done.wait(30)
            return str(error)

    answers = in_processes(6, work)
    owners = [(number, answer) for number, answer in enumerate(answers) if answer.startswith("owner")]
    assert len(owners) == 1
    number, answer = owners[0]
    assert (folder / "config.yaml").read_text() == (folder / "log.jsonl").read_text() == str(number)
    refused = [text for text in answers if text != answer]
    assert all("another process is training in this folder" in text for text in refused)
    assert all(f"process {answer.split()[1]} on " in text for text in refused)


def test_the_folder_is_the_owners_from_its_first_moment_to_the_last(tmp_path: Path) -> None:
    """Claimed and taken back again and again by several: at no moment two are in it, and none fails otherwise."""
    folder, inside = tmp_path / "run", tmp_path / "inside"

    def work(_number: int) -> str:
        entered = 0
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            try:
                with claim.claimed(str(folder), "tiny"):
                    inside.mkdir()  # fails if another is in
                    (folder / "config.yaml").touch()
                    entered += 1
                    inside.rmdir()
                    raise UserError("wrong")
            except UserError as error:
                if str(error) != "wrong" and "another process is training" not in str(error):
                    return f"unexpected: {error}"
        return str(entered)

    assert sum(map(int, in_processes(3, work))) > 20
    assert not folder.exists() or not list(folder.iterdir())


def test_another_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "train.log").write_text("mine")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".lock").write_text("mine")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for name in ("thesis", "venv", "file"):
        for go_on in (False, True):
            with (
                pytest.raises(UserError, match="is not an empty folder"),
                claim.claimed(str(tmp_path / name), "tiny", go_on=go_on),
            ):
                pass
    assert snapshot(tmp_path) == before
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".lock").symlink_to(outside)
    with pytest.raises(UserError, match="cannot be written"), claim.claimed(str(tmp_path / "linked"), "tiny"):
        pass
    assert outside.read_text() == "mine"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a link that points nowhere"), claim.claimed(str(tmp_path / "dangling"), "x"):
        pass


DEAD = {
    "the folder alone": [],
    "a lock that nobody signed": [".lock"],
    "the logs": [".lock", "log.jsonl", "train.log"],
    "a configuration half written": [".lock", "log.jsonl", "train.log", "config.yaml.tmp-0123abcd"],
    "another process's log": [".lock", "log.jsonl", "process-1/train.log", "process-1/log.jsonl"],
    "a crash before the configuration": [".lock", "train.log", "crash.log"],
}


@pytest.mark.parametrize("name", DEAD)
def test_what_died_before_its_configuration_is_begun_anew(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for go_on in (False, True):
        folder.mkdir()
        for part in DEAD[name]:
            (folder / part).parent.mkdir(exist_ok=True)
            (folder / part).write_text("old")
        with claim.claimed(str(folder), "tiny", go_on=go_on) as owned:
            assert owned.state == claim.NEW
            assert {path.name for path in folder.iterdir()} - {"crash.log"} == {".lock"}
            assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
            (folder / "config.yaml").touch()
        with pytest.raises(UserError, match="go on with the run in it by --resume"), claim.claimed(str(folder), "tiny"):
            pass
        with claim.claimed(str(folder), "tiny", go_on=True) as owned:
            assert owned.state == claim.BEGUN
        (folder / "FINISHED").touch()
        with claim.claimed(str(folder), "tiny", go_on=True) as owned:
            assert owned.state == claim.DONE
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_wrong_command_takes_back_its_folder_and_nothing_else(tmp_path: Path) -> None:
    folder, new = tmp_path / "run", tmp_path / "new"
    folder.mkdir()

    def fail(place: Path, *names: str) -> None:
        with claim.claimed(str(place), "tiny"):
            for name in names:
                (place / name).touch()
            raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        fail(folder, "log.jsonl")
    assert list(folder.iterdir()) == []  # it was there before
    with pytest.raises(UserError, match="wrong"):
        fail(folder, "log.jsonl", "notes.txt")
    assert {path.name for path in folder.iterdir()} == {".lock", "log.jsonl", "notes.txt"}
    with pytest.raises(UserError, match="wrong"):
        fail(new, "log.jsonl", "train.log")
    assert not new.exists()


def test_a_killed_owner_leaves_no_lock_and_a_living_one_is_named(tmp_path: Path) -> None:
    ready, release = FORK.Event(), FORK.Event()

    def hold() -> None:
        with claim.resumed(tmp_path):
            ready.set()
            release.wait(60)

    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.json.tmp-0123abcd").touch()  # of a process that was killed
    (tmp_path / "notes.tmp-0123abcd").touch()
    owner = FORK.Process(target=hold)
    owner.start()
    assert ready.wait(30)
    before = snapshot(tmp_path)
    with (
        pytest.raises(UserError, match=rf"another process is .*process {owner.pid} on .* since 20"),
        claim.resumed(tmp_path),
    ):
        pass
    assert snapshot(tmp_path) == before
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(30)
    with claim.resumed(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml", "notes.tmp-0123abcd"}


def test_the_children_of_a_killed_owner_are_waited_for(tmp_path: Path) -> None:
    """Data loaders share the lock of the process that forked them until they notice that it is gone."""
    path, ready = tmp_path / "lock", FORK.Event()

    def hold() -> None:
        with ownership.Lock(path):
            if os.fork() == 0:
                time.sleep(1.0)
                os._exit(0)
            ready.set()
            time.sleep(60)

    owner = FORK.Process(target=hold)
    owner.start()
    assert ready.wait(30)
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(30)
    with ownership.Lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_that_was_replaced_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inner, calls = tmp_path / "lock", ownership.fcntl.flock, 0

    def slow(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()  # its last owner took it away between our opening and our locking
        inner(descriptor, operation)

    monkeypatch.setattr(ownership.fcntl, "flock", slow)
    with ownership.Lock(path):
        assert calls == 2
        assert path.exists()


def test_a_file_is_written_whole_or_not_at_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    run_folder.write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_folder.write_text(path, "new")
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"config.yaml": "old"}
