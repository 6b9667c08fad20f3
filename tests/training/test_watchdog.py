"""Nothing waits without end: a port, a data-loading process, a save, a call that keeps the interpreter's lock."""

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen import evaluate, train
from astrobiogen.training import checkpoint
from astrobiogen.training import run as whole_run
from astrobiogen.training.batches import assemble
from astrobiogen.training.checkpoint import CheckpointStore
from astrobiogen.training.config import CheckpointConfig, DataConfig, claim, command_line
from astrobiogen.training.config.watch import HangConfig, SpikeConfig
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import PeerError, World, roles, runtime
from astrobiogen.training.observe import watchdog
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.observe.watchdog import EXIT_HUNG, Watchdog, limits_of, within
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import lr_finder
from astrobiogen.training.trainer import Trainer
from tests.training.conftest import ToySamples, toy_config, toy_task

MOST = 30.0  # seconds until a child of these tests counts as hung


def child(
    work: Callable[[], object], folder: Path, during: Callable[[int], None] = lambda _pid: None
) -> tuple[int, str]:
    """Fork a process that does `work`; its exit status and what it wrote on stderr. It must end by itself."""
    errors = folder / "stderr"
    process = os.fork()
    if process == 0:
        status = 99
        try:
            descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 2)
            work()
            status = 0
        finally:
            os._exit(status)
    during(process)
    end = time.monotonic() + MOST
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), errors.read_text()
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"still there after {MOST} s: {errors.read_text()}")


def sleeping_beauty() -> None:
    time.sleep(60)


def test_a_hung_section_ends_the_process_with_its_name_and_stacks(tmp_path: Path) -> None:
    told: list[str] = []

    def tell(text: str) -> None:
        (tmp_path / "told").write_text(text)

    def work() -> None:
        with Watchdog(tmp_path, {"save": 0.3, "step": 5.0}, (1, 2), tell) as dog, dog.section("save"):
            sleeping_beauty()

    status, errors = child(work, tmp_path)
    assert status == EXIT_HUNG
    assert "error: process 1 of 2 hung: section 'save' made no progress for 0.3" in errors
    assert "(hang.save_minutes 0.005)" in errors
    text = (tmp_path / "hang-process-1.txt").read_text()
    assert "sleeping_beauty" in text
    assert "section 'save'" in text
    assert "section 'save'" in (tmp_path / "told").read_text()
    assert not told


def test_sections_that_get_on_are_left_alone() -> None:
    left: list[int] = []
    with Watchdog(None, {"validation": 0.3, "step": 0.3, "data": 0.3}, leave=left.append) as dog:
        with dog.section("validation") as section:
            for _ in range(6):
                time.sleep(0.1)
                section.beat()
            with dog.section("save"):  # has no limit, and its time is not the outer section's
                time.sleep(0.6)
        for _ in dog.each("data", range(4)):
            time.sleep(0.15)
        time.sleep(0.5)
    assert left == []
    assert list(Watchdog(None, {}).each("data", "abc")) == ["a", "b", "c"]


def test_the_watchdog_itself_cannot_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_DEED_SECONDS", 0.2)
    os.mkfifo(tmp_path / "hang-process-0.txt")  # a file system that stalls: opening it never returns

    def work() -> None:
        forever: Callable[[str], None] = lambda _text: time.sleep(60)  # noqa: E731 - peers that do not answer
        with Watchdog(tmp_path, {"step": 0.2}, tell=forever) as dog, dog.section("step"):
            sleeping_beauty()

    status, errors = child(work, tmp_path)
    assert status == EXIT_HUNG
    assert "section 'step'" in errors


def test_a_call_that_keeps_the_interpreters_lock_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 0.2)

    def work() -> None:
        with Watchdog(tmp_path, {"step": 0.4}) as dog, dog.section("step"):
            time.sleep(0.2)  # the watchdog has looked once
            ctypes.PyDLL(None).sleep(60)

    status, errors = child(work, tmp_path)
    assert status == 1
    assert "Timeout" in errors
    assert "test_watchdog.py" in errors


def test_a_stopped_process_did_not_hang(tmp_path: Path) -> None:
    def work() -> None:
        with Watchdog(tmp_path, {"step": 1.0}) as dog, dog.section("step"):
            (tmp_path / "there").touch()
            end = time.monotonic() + 2.4
            while time.monotonic() < end:
                time.sleep(0.02)

    def stop(process: int) -> None:
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        os.kill(process, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(process, signal.SIGCONT)

    assert child(work, tmp_path, stop) == (0, "")


class Stuck(ToySamples):
    """Samples of which one never comes."""

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            Path(os.environ["STUCK"]).write_text(str(os.getpid()))
            sleeping_beauty()
        return super().__getitem__(index)


def trained(folder: Path, limits: dict[str, float], workers: int, observer: Any = None) -> None:
    config = toy_config(
        data=DataConfig(batch_size=4, accumulation=4, workers=workers), checkpoint=CheckpointConfig(every_minutes=1e-9)
    )
    task = toy_task(config)
    if workers:
        task = type(task)(**{**vars(task), "train": Stuck(23, seed=1)})
    with Monitor(folder, config.monitor) as monitor, Watchdog(folder, limits) as dog:
        run = Run(config, torch.device("cpu"), torch.float32, folder, monitor)
        Trainer(task, run, runtime.Interrupt(), observer=observer, watchdog=dog).fit()


def test_a_hung_data_worker_is_named_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUCK", str(tmp_path / "worker"))
    status, errors = child(lambda: trained(tmp_path, {"data": 1.5}, workers=1), tmp_path)
    assert status == EXIT_HUNG
    assert "section 'data' made no progress for 1." in errors
    assert "sleeping_beauty" in errors  # the worker's own stack
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "worker").read_text()), 0)


def test_a_hung_save_is_named_and_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    seen: list[str] = []

    def observer(stage: str) -> None:
        seen.append(stage)
        if seen.count("before commit") == 3:
            sleeping_beauty()

    status, errors = child(lambda: trained(tmp_path, {"save": 1.0}, 0, observer), tmp_path)
    assert status == EXIT_HUNG
    assert "section 'save' made no progress for 1" in errors
    found = CheckpointStore(tmp_path / "checkpoints", keep=2).load_newest()
    assert found is not None
    assert found[0].name == "step-00000002"


def test_a_port_held_by_a_silent_program_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astrobiogen.training.distributed.world._GRACE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        for name, value in (place | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        with pytest.raises(PeerError, match=r"meeting the other processes: .* within 0\.02 minutes"):
            World.join(0.02, cuda=False)
        assert time.monotonic() - started < 10


def test_within() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(KeyError, match="a"):
        within(5.0, lambda: {}["a"])
    with pytest.raises(TimeoutError, match=r"no answer for 0\.1 s"):
        within(0.1, lambda: time.sleep(1.0))


def test_limits_are_checked_and_can_be_switched_off() -> None:
    assert limits_of(HangConfig(data_minutes=0, save_minutes=2))["save"] == 120.0
    assert "data" not in limits_of(HangConfig(data_minutes=0))
    assert set(limits_of(HangConfig())) == set(watchdog.SECTIONS)
    with pytest.raises(ValueError, match=r"hang\.save_minutes: got -1"):
        HangConfig(save_minutes=-1)
    for name, wrong in (("factor", 1.0), ("window", 0)):
        with pytest.raises(ValueError, match=rf"spike\.{name}: got {wrong}"):
            SpikeConfig(**{name: wrong})  # type: ignore[arg-type]


# Seconds: what is to hang is found at once, what comes before it has time.
HUNG = {"setup": {"setup": 0.5}, "step": {"setup": MOST, "step": 0.5}}


def command(
    work: Callable[[], int], patches: dict[Any, tuple[str, Any]], section: str = "setup"
) -> Callable[[], object]:
    """`work` with a limit of half a second for `section` and with what hangs."""

    def inside() -> None:
        with pytest.MonkeyPatch.context() as patch:
            for module in (train, evaluate, whole_run, roles):
                patch.setattr(module, "limits_of", lambda _config: HUNG[section])
            for owner, (name, value) in patches.items():
                patch.setattr(owner, name, value)
            work()

    return inside


@pytest.mark.parametrize(
    ("arguments", "patches", "section"),
    [
        ([], {command_line: ("parse", lambda _: sleeping_beauty())}, "setup"),
        (["--output", "FOLDER/run"], {claim: ("claimed", lambda *_, **__: sleeping_beauty())}, "setup"),
        (["--output", "FOLDER/run"], {precision: ("choose_dtype", lambda *_: sleeping_beauty())}, "setup"),
        (["--output", "FOLDER/run", "--find-lr"], {claim: ("claimed", lambda *_: sleeping_beauty())}, "setup"),
        (["--output", "FOLDER/run", "--find-lr"], {assemble: ("load_bundle", lambda *_: sleeping_beauty())}, "setup"),
        (
            ["--output", "FOLDER/run", "--find-lr"],
            {lr_finder: ("find", lambda *_: sleeping_beauty())},
            "step",
        ),
    ],
    ids=["the command line", "the folder", "the device", "--find-lr: folder", "--find-lr: data", "--find-lr: update"],
)
def test_what_comes_before_training_and_beside_it_is_watched(
    tmp_path: Path, arguments: list[str], patches: dict[Any, tuple[str, Any]], section: str
) -> None:
    given = [item.replace("FOLDER", str(tmp_path)) for item in arguments]
    status, errors = child(command(lambda: train.main(given), patches, section), tmp_path)
    assert status == EXIT_HUNG, errors
    assert f"hung: section {section!r} made no progress" in errors


def test_a_hung_evaluation_is_named(tmp_path: Path) -> None:
    hangs = {checkpoint: ("read", lambda _path: sleeping_beauty())}
    (tmp_path / "manifest.json").touch()
    status, errors = child(command(lambda: evaluate.main([str(tmp_path)]), hangs), tmp_path)
    assert status == EXIT_HUNG, errors
    assert "hung: section 'setup' made no progress" in errors
    assert "nothing was trained, so nothing is lost" in errors
