"""How a run ends and says so: signals, exit status, the files PREEMPTED and FINISHED, and the same command again."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from astrobiogen import data, train
from astrobiogen.training import config
from astrobiogen.training.batches import shared_items
from astrobiogen.training.config import as_dict, parser, requeue, run_folder
from astrobiogen.training.distributed import World, ending, runtime
from astrobiogen.training.errors import UserError
from tests.training.conftest import Run, toy_config

MakeRun = Callable[..., Run]
SHORT = [
    *("--smoke", "--data.limit", "16", "--monitor.progress", "plain", "--monitor.level", "WARNING"),
    *("--evaluation.bootstrap", "0", "--evaluation.baselines", "false", "--evaluation.ablation", "false"),
]


@pytest.fixture(scope="module")
def bundle() -> data.DatasetBundle:
    return data.synthetic.make_bundle(16, 0)


@pytest.fixture(autouse=True)
def _bundled(bundle: data.DatasetBundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The synthetic data in place of the bundled data; PyTorch's deterministic mode as it was afterwards. SIGHUP as in
    a terminal: where the tests run under nohup, training would rightly leave it ignored.
    """
    monkeypatch.setattr(data, "load_bundled", lambda: bundle)
    mode = torch.are_deterministic_algorithms_enabled()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, hangup)
    torch.use_deterministic_algorithms(mode)


def signalled(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Send these signals to ourselves while the second batch is prepared."""
    inner, calls = shared_items.collate_shared, 0

    def collate(samples: Any, pad_id: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            for number in numbers:
                os.kill(os.getpid(), number)
        return inner(samples, pad_id)

    monkeypatch.setattr(shared_items, "collate_shared", collate)


@pytest.mark.parametrize("number", runtime.STOPPING, ids=lambda number: number.name)
def test_every_stopping_signal_saves_and_ends_training(number: signal.Signals, make_run: MakeRun) -> None:
    run = make_run(toy_config())
    with run.interrupt:
        os.kill(os.getpid(), number)
        assert run.trainer.fit() is False
    assert run.interrupt.received == number.name
    assert run.interrupt.saved
    assert [path.name for path in run.trainer.saver.store.candidates()] == ["step-00000001"]


def test_warnings_before_the_end_do_not_end_at_once_and_a_hangup_under_nohup_does_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.received
            # As batch systems send them: a warning, the limit of processor time every second, the end.
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGXCPU, signal.SIGXCPU, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert interrupt.received == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("pair", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_insisting_signal_ends_at_once(pair: tuple[int, int]) -> None:
    process = os.fork()
    if process == 0:
        with runtime.Interrupt():
            for number in pair:
                os.kill(os.getpid(), number)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == pair[1]


def test_the_copy_that_torchruns_agent_sends_does_not_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with runtime.Interrupt() as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == "SIGTERM"


def test_the_same_command_starts_goes_on_and_says_that_it_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    command = [*SHORT, "--precision.dtype", "auto", "--output", str(folder), "--resume", "auto"]
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGUSR1)
        assert train.main(command) == 75
    mark = json.loads((folder / "PREEMPTED").read_text())
    assert (mark["step"], mark["reason"], mark["saved"]) == (1, "SIGUSR1", True)
    assert mark["go_on"] == f"python -m astrobiogen.train --resume '{folder}'"
    assert not (folder / "FINISHED").exists()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGHUP)
        assert train.main([*command, "--runtime.preempted_status", "99"]) == 99
    assert json.loads((folder / "PREEMPTED").read_text())["step"] == 2
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM)
        patch.setenv("TORCHELASTIC_RUN_ID", "none")  # its agent would report a failure
        assert train.main(command) == 0
    assert (folder / "PREEMPTED").exists()
    assert train.main(command) == 0
    assert not (folder / "PREEMPTED").exists()
    assert set(json.loads((folder / "FINISHED").read_text())) == {"step", "reason"}
    figures = (folder / "metrics.json").read_bytes()
    assert json.loads(figures)["run"]["epochs"] == 2
    capsys.readouterr()
    stamp = (folder / "log.jsonl").stat().st_mtime_ns
    assert train.main(command) == 0
    assert f"{folder}: finished before, at step" in capsys.readouterr().out
    assert (folder / "log.jsonl").stat().st_mtime_ns == stamp
    assert (folder / "metrics.json").read_bytes() == figures
    assert train.main([*command, "--seed", "5"]) == 2
    said = capsys.readouterr().err
    assert "holds a run of another configuration" in said
    assert "seed: the run has 0, asked for 5" in said
    assert train.main(["--resume", "auto"]) == 2
    assert "--resume auto: needs --output" in capsys.readouterr().err


def test_the_number_format_chosen_at_the_beginning_is_kept(tmp_path: Path) -> None:
    saved = as_dict.to_dict(config.preset("tiny"))  # fp32, as chosen then
    run_folder.write_text(tmp_path / "config.yaml", yaml.safe_dump(saved))
    assert requeue.agreed(parser.from_dict(saved | {"precision": {"dtype": "auto"}}), tmp_path) == (
        parser.from_dict(saved)
    )
    with pytest.raises(UserError, match=r"epochs: the run has 8, asked for 9"):
        requeue.agreed(parser.from_dict(saved | {"epochs": 9}), tmp_path)


def test_an_end_that_cannot_be_written_down_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_path: Path, _value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    ending.preempted(tmp_path, 3, "SIGTERM", False, World())
    assert "PREEMPTED could not be written (No space left on device)" in caplog.text


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (("--runtime.threads", "100000"), "runtime.threads: got 100000, expected 0 to 1024"),
        (("--seed", str(2**64)), "seed: got 18446744073709551616, expected 0 to 4294967295"),
        (("--seed", str(2**32)), "seed: got 4294967296, expected 0 to 4294967295"),
        (("--seed", "-1"), "seed: got -1, expected 0 to 4294967295"),
        (("--data.workers", "100000"), "data.workers: got 100000, expected 0 to 1024"),
        (("--runtime.preempted_status", "256"), "runtime.preempted_status: got 256, expected 0 to 255"),
    ],
)
def test_numbers_that_nothing_can_be_made_of_are_refused_by_name(
    option: tuple[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*option, "--output", str(tmp_path / "run")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_seeds_every_generator() -> None:
    runtime.seed_everything(config.MAX_SEED)
    assert torch.initial_seed() == config.MAX_SEED
    first = torch.rand(3)
    runtime.seed_everything(config.MAX_SEED)
    assert torch.equal(torch.rand(3), first)
    assert torch.Generator().manual_seed(config.MAX_SEED).initial_seed() == config.MAX_SEED
