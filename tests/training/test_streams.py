"""The console and the log files are there for the run, not the run for them."""

import io
import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astrobiogen.system import console
from astrobiogen.training.config import run_folder
from astrobiogen.training.errors import UserError
from astrobiogen.training.observe import failure
from astrobiogen.training.observe.log_file import LogFile
from astrobiogen.training.observe.monitor import Monitor, read_log
from tests.training.conftest import toy_config

ROOT = Path(__file__).parents[2]
STREAMS = ("full", "head", "closed", "all closed")
# Trains the toy model under the console of the command, once for each of STREAMS in a process of its own: a memory
# report with the profiler, log lines, a closing table.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from astrobiogen.system import console
from astrobiogen.training.observe import failure
from astrobiogen.training.distributed import runtime
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.context import Run
from astrobiogen.training.trainer import Trainer
from tests.training import conftest as toy

def arrange(name):
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if name.endswith("closed"):
        for number in (0, 1, 2) if name == "all closed" else (1, 2):
            os.close(number)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
        return
    reader, writer = os.pipe() if name == "head" else (os.dup(0), os.open("/dev/full", os.O_WRONLY))
    os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1)

def command():
    config = toy.toy_config(epochs=2)
    with Monitor(folder, toy.dataclasses.replace(config.monitor, level="INFO")) as monitor:
        run = Run(config, torch.device("cpu"), torch.float32, folder, monitor)
        assert Trainer(toy.toy_task(config), run, runtime.Interrupt()).fit()
    for line in range(1000):
        print("a closing table of many lines", line)
    (folder / "done").touch()
    return 7

base, *names = sys.argv[1:]
statuses = {}
for name in names:
    folder = Path(base) / name
    folder.mkdir()
    process = os.fork()
    if process == 0:
        arrange(name)
        with console.best_effort():
            code = failure.guarded(command, lambda: folder)
        sys.exit(code)
    statuses[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
(Path(base) / "statuses.json").write_text(json.dumps(statuses))
"""


def test_a_console_that_is_gone_ends_no_run_and_hides_no_end(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *STREAMS]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=300, check=True)
    assert json.loads((tmp_path / "statuses.json").read_text()) == dict.fromkeys(STREAMS, 7)
    for name in STREAMS:
        folder = tmp_path / name
        assert {"done", "memory_report.json", "train.log"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "crash.log").exists()
        lines = (folder / "train.log").read_text().splitlines()
        assert all(re.match(r"20\d\d-\d\d-\d\d ", line) for line in lines)  # nothing else was printed into it
        assert "training ended: " in lines[-1]
        assert [record["event"] for record in read_log(folder / "log.jsonl")].count("epoch") == 2


class Broken(io.StringIO):
    """A stream that cannot be written."""

    encoding = "ascii"  # type: ignore[assignment]

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), ValueError("closed")])
def test_writing_to_a_broken_stream_is_no_error(error: Exception) -> None:
    stream = console.BestEffort(Broken(error))
    assert stream.write("text") == 4
    stream.writelines(["a", "b"])
    stream.flush()
    assert not stream.isatty()
    assert console.BestEffort(None).write("text") == 4
    assert not console.BestEffort(None).isatty()


def test_what_a_console_cannot_encode_is_escaped() -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    assert console.BestEffort(inner).write("3 \u00b5m\n") == 5
    assert inner.buffer.getvalue() == b"3 \\xb5m\n"  # type: ignore[attr-defined]


def test_the_last_line_of_the_log_is_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("data: gone", exit_code=1)

    assert failure.guarded(fail, lambda: tmp_path) == 1  # no run folder: nothing is made in it
    assert not list(tmp_path.iterdir())
    (tmp_path / "train.log").write_text("before\n")
    assert failure.guarded(fail, lambda: tmp_path) == 1
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1].endswith(" ERROR error: data: gone")
    assert capsys.readouterr().err == "error: data: gone\n" * 2


def test_crash_logs_are_new_files_or_in_the_run_folder_and_follow_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise KeyError("gone")

    temporary, folder, mine = tmp_path / "tmp", tmp_path / "run", tmp_path / "mine"
    temporary.mkdir()
    folder.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr(failure.tempfile, "tempdir", str(temporary))
    for name in ("crash.log", "astrobiogen-crash.log"):
        (temporary / name).symlink_to(mine)
    (folder / "crash.log").symlink_to(mine)
    (folder / "train.log").symlink_to(mine)
    assert failure.guarded(fail, lambda: None) == 1
    assert failure.guarded(fail, lambda: folder) == 1
    made = sorted(path for path in temporary.iterdir() if not path.is_symlink())
    assert len(made) == 2
    assert all("KeyError: 'gone'" in path.read_text() for path in made)
    assert mine.read_text() == "mine"
    said = capsys.readouterr().err
    assert all(f"(details: {path})" in said for path in made)
    (folder / "crash.log").unlink()
    assert failure.guarded(fail, lambda: folder) == 1
    assert "Traceback" in (folder / "crash.log").read_text()
    (folder / "crash.log").unlink()
    (folder / "crash.log").mkdir()
    monkeypatch.setattr(failure.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert failure.guarded(fail, lambda: folder) == 1
    assert "(details: none, they could not be written: " in capsys.readouterr().err


@pytest.fixture
def small_files() -> Iterator[Any]:
    """`small_files(bytes)`: files may not grow beyond this; 0: as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_log_on_a_full_disk_is_said_once_counted_and_goes_on_when_there_is_room(
    tmp_path: Path, small_files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, toy_config().monitor) as monitor:
        monitor.logger.setLevel("INFO")
        monitor.logger.info("first")
        monitor.record("step", step=1, loss=1.0)
        small_files(60)
        for step in range(2, 6):
            monitor.logger.info("line of step %d", step)
            monitor.record("step", step=step, loss=1.0)
        small_files(0)
        monitor.logger.info("last")
        monitor.record("step", step=6, loss=1.0)
        lost = monitor.lost
    said = capsys.readouterr().err
    assert said.count("the log file cannot be written (") == 1
    assert said.count("log.jsonl cannot be written (") == 1
    assert "line of step 5" in said
    assert lost["log_records_lost"] == 4
    assert lost["log_lines_lost"] >= 4
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records if record["event"] == "step"] == [1, 6]
    assert [record["lost"] for record in records if record["event"] == "log_gap"] == [4]
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert "first" in lines[0]
    assert f"({lost['log_lines_lost']} lines could not be written here)" in lines
    assert lines[-1].endswith("INFO last")


def test_the_line_handler_writes_at_once_and_marks_a_gap(tmp_path: Path, small_files: Any) -> None:
    logger = logging.Logger("lines")
    handler = LogFile(tmp_path / "x.log", logger)
    logger.addHandler(handler)
    logger.warning("one")
    assert (tmp_path / "x.log").read_text() == "one\n"
    small_files(6)
    logger.warning("two two")  # "tw" fits
    small_files(0)
    logger.warning("three")
    handler.close()
    assert (tmp_path / "x.log").read_text() == "one\ntw\n(2 lines could not be written here)\nthree\n"
    assert handler.lost == 2


def test_a_memory_report_on_a_full_disk_is_said_and_training_goes_on(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_path: Path, _value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    assert make_run(toy_config()).trainer.fit()
    assert f"{run_folder.MEMORY} could not be written (No space left on device)" in caplog.text
