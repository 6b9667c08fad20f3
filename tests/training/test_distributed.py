"""Two processes train as one would: same weights, agreed ends, checkpoints for any number of processes, no hangs.

One pair of processes runs all of `distributed_cases.py`; the tests compare what it has left with runs in this process.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.training import checkpoint
from astrobiogen.training.config import PrecisionConfig
from astrobiogen.training.config.as_dict import changed_on_resume, to_dict
from astrobiogen.training.distributed import PeerError, World
from astrobiogen.training.distributed.share import rounds, shared_order

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("distributed_cases", Path(__file__).with_name("distributed_cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["distributed_cases"] = cases
_spec.loader.exec_module(cases)

SILENT = """
import sys, time
from astrobiogen.training.distributed import World
with World.join(minutes=0.02, cuda=False) as world:
    if world.main:
        world.barrier()
    time.sleep(30)
"""


def start_pair(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes with torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two processes have left: results by case, `folder`, and `output` of each."""
    folder = tmp_path_factory.mktemp("pair")
    # made by one process, for two to go on with
    for name, settings in resumable().items():
        arm = cases.stop_at(0, World(), 1)
        cases.trained(settings, folder / "interrupted_and_resumed" / name / "one to two", World(), before=arm)
    processes = start_pair(str(Path(__file__).with_name("distributed_cases.py")), str(folder))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    results: dict[str, Any] = {
        case.__name__: torch.load(path, weights_only=True)
        for case in cases.CASES
        if (path := folder / f"{case.__name__}.pt").exists()
    }
    assert len(results) == len(cases.CASES), outputs[0] + outputs[1]
    return results | {"folder": folder, "output": outputs, "codes": [process.returncode for process in processes]}


def resumable() -> dict[str, Any]:
    return {
        "ddp": cases.config(),
        "fsdp2": cases.config("fsdp2"),
        "fsdp2 8-bit": cases.config("fsdp2", optimizer=cases.EIGHT_BIT),
    }


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest weight."""
    assert one.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[name]).abs().max()) for name, value in one.items()) / largest


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of one process with the same configuration."""
    return cases.outcome(cases.trained(cases.config(), tmp_path_factory.mktemp("alone"), World()))


@pytest.mark.parametrize(
    ("strategy", "limit"),
    [("ddp", 1e-6), ("fsdp2", 1e-5), ("fsdp2 offload", 1e-5), ("fsdp2 once", 1e-5)],
)
def test_two_processes_equal_one(pair: dict[str, Any], alone: dict[str, Any], strategy: str, limit: float) -> None:
    got = pair["equal_training"][strategy]
    assert distance(alone["weights"], got["weights"]) < limit
    assert distance(alone["averages"], got["averages"]) < limit
    assert got["updates"] == alone["updates"] == 4
    assert got["best"] == pytest.approx(alone["best"], rel=1e-5)


def test_a_window_of_one_batch_is_split_between_processes(pair: dict[str, Any], tmp_path: Path) -> None:
    alone = cases.outcome(cases.trained(cases.config(accumulation=1), tmp_path, World()))
    got = pair["equal_training"]["ddp split"]
    assert distance(alone["weights"], got["weights"]) < 1e-6
    assert got["updates"] == alone["updates"] == 12


def test_blocks_see_whole_ordinary_weights(pair: dict[str, Any]) -> None:
    assert pair["equal_training"]["seen"] == ["(<class 'torch.Tensor'>, torch.float32)"]


def test_eight_bit_optimizer_on_shards_follows_the_whole_one(pair: dict[str, Any], tmp_path: Path) -> None:
    settings = cases.config(optimizer=cases.EIGHT_BIT)
    trainer = cases.trained(settings, tmp_path, World())
    start = cases.task_of(settings, 0.0).model.state_dict()
    alone, got = cases.outcome(trainer)["weights"], pair["equal_training"]["fsdp2 8-bit"]["weights"]
    moved = max(float((alone[name] - start[name]).abs().max()) for name in start)
    apart = max(float((alone[name] - got[name]).abs().max()) for name in start)
    # Blocks of 256 values begin elsewhere in a shard, so the codes differ: never equal, but close beside the way.
    assert 0 < apart < 0.1 * moved


def test_mixed_precision(pair: dict[str, Any], tmp_path: Path) -> None:
    result = pair["mixed_precision"]
    assert result["ddp"]["seen"] == ["torch.float32"]
    assert result["fsdp2"]["seen"] == ["torch.bfloat16"]
    assert result["fsdp2"]["stored"] == ["torch.float32"]
    settings = cases.config(precision=PrecisionConfig(dtype="bf16"))
    alone = cases.outcome(cases.trained(settings, tmp_path / "bf16", World(), dtype=torch.bfloat16))
    exact = cases.outcome(cases.trained(cases.config(), tmp_path / "fp32", World()))
    error = distance(exact["weights"], alone["weights"])
    assert error > 0
    for strategy in ("ddp", "fsdp2"):  # as far from fp32 as one process in bf16 is
        assert distance(exact["weights"], result[strategy]["weights"]) < 3 * error


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2 8-bit"])
def test_fp16_skips_together_and_resumes_to_the_bit(pair: dict[str, Any], name: str) -> None:
    whole, resumed = pair["fp16"][f"{name} whole"], pair["fp16"][f"{name} resumed"]
    assert whole["seen"] == ["torch.float16" if name.startswith("fsdp2") else "torch.float32"]
    assert whole["stored"] == ["torch.float32"]
    # One of the two updates of each epoch holds the sample that overflows.
    assert (whole["updates"], whole["skipped"]) == (3, 3)
    assert whole["equal"]
    assert all(bool(torch.isfinite(value).all()) for value in whole["weights"].values())
    assert whole["scalers"][0] == whole["scalers"][1]
    assert whole["scalers"][0]["scale"] == 2.0**12  # halved and doubled three times
    assert pair["fp16"][f"{name} stop 1"]["updates"] == 0
    for key in ("scalers", "updates", "skipped", "best", "stopped"):
        assert resumed[key] == whole[key]
    for kind in ("weights", "averages"):
        assert all(torch.equal(value, resumed[kind][key]) for key, value in whole[kind].items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_tokens_weigh_the_same_whichever_process_has_them(pair: dict[str, Any], strategy: str, share: float) -> None:
    """Texts of 1 to 32 tokens and absent graphs, in micro-batches of 1 to 7 samples that two processes share, against
    one process with all 32 samples in one batch.
    """
    got = pair["ragged_window"][f"{strategy} {share}"]
    full, loss = cases.ragged.gradients(cases.ragged.task(share), [cases.ragged.SAMPLES])
    assert len(full) > 50
    assert cases.ragged.apart(full, got["gradients"]) < 1e-6
    assert got["loss"] == pytest.approx(loss, rel=1e-6)


def test_memory_is_measured_in_every_process(pair: dict[str, Any]) -> None:
    weights = 4 * pair["memory"]["parameters"]
    for strategy, share, limit in (("ddp", 1.0, 0.15), ("fsdp2", 0.5, 0.3)):
        report = pair["memory"][strategy]
        assert len(report["processes"]) == 2
        for one in report["processes"]:
            assert one["measured_bytes"]["weights"] == pytest.approx(share * weights, rel=0.02)
            assert one["planned_bytes"]["optimizer"] == pytest.approx(2 * share * weights, rel=0.02)
            assert one["measured_bytes"].get("gradient buckets", 0) == (weights if strategy == "ddp" else 0)
            assert one["measured_over_planned"] == pytest.approx(1.0, abs=limit)
        assert report["measured_bytes"] in [one["measured_bytes"] for one in report["processes"]]
        largest = max(one["measured_bytes"]["total"] for one in report["processes"])
        assert report["measured_bytes"]["total"] == largest


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2 8-bit"])
def test_signal_in_one_process_stops_all_and_resuming_is_bitwise(pair: dict[str, Any], name: str) -> None:
    result = pair["interrupted_and_resumed"]
    assert result[f"{name} stop 1"]["batch"] == 2  # inside the window of four
    assert result[f"{name} stop 1"]["stopped"] == ""
    whole, resumed = result[f"{name} whole"], result[f"{name} resumed"]
    assert resumed["stopped"] == whole["stopped"] == "all epochs done"
    for kind in ("weights", "averages"):
        assert all(torch.equal(value, resumed[kind][key]) for key, value in whole[kind].items())
    assert whole["best"] == resumed["best"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2 8-bit"])
def test_saved_by_two_goes_on_in_one_and_back(
    pair: dict[str, Any], alone: dict[str, Any], tmp_path: Path, name: str
) -> None:
    result, folder = pair["interrupted_and_resumed"], pair["folder"] / "interrupted_and_resumed" / name
    reached = cases.outcome(cases.trained(resumable()[name], folder / "two to one", World()))
    expected = alone
    if name.endswith("8-bit"):
        expected = cases.outcome(cases.trained(resumable()[name], tmp_path, World()))
    limit = 0.02 if name.endswith("8-bit") else 1e-5
    assert reached["updates"] == expected["updates"]
    assert distance(expected["weights"], reached["weights"]) < limit
    assert distance(expected["weights"], result[f"{name} one to two"]["weights"]) < limit


def test_sharded_checkpoints_are_verified_and_fall_back(pair: dict[str, Any]) -> None:
    root = pair["folder"] / "equal_training" / "fsdp2" / "checkpoints"
    store = checkpoint.CheckpointStore(root, keep=3)
    newest, older = store.candidates()[:2]
    shards = sorted(path for path in newest.rglob("shard-*"))
    assert {path.name[:11] for path in shards} == {"shard-00001", "shard-00002"}
    assert not list(newest.rglob("*.metadata"))
    for path in shards:
        data = path.read_bytes()
        for damaged in (
            data[:-1],
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        ):
            path.write_bytes(damaged)
            found = store.load_newest()
            assert found is not None
            assert found[0] == older
        path.write_bytes(data)
    assert store.load_newest()[0] == newest  # type: ignore[index]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bad_batch_in_one_process_is_skipped_by_all(pair: dict[str, Any], strategy: str) -> None:
    result = pair["bad_batch"][strategy]
    assert result["counts"] == [(1, 1), (1, 1)]
    assert result["equal"]
    assert all(bool(torch.isfinite(value).all()) for value in result["weights"].values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_full_disk_in_one_process_commits_nothing(pair: dict[str, Any], strategy: str) -> None:
    result = pair["full_disk"][strategy]
    assert result["stopped"] == "all epochs done"
    assert result["names"] == ["latest", "step-00000006"]
    assert "No space left on device (process 1 of 2)" in pair["output"][0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_checkpoints_written_in_the_background_are_those_written_at_once(pair: dict[str, Any], strategy: str) -> None:
    folders = [pair["folder"] / "in_background" / strategy / name / "checkpoints" for name in ("at once", "behind")]
    names = [sorted(path.name for path in folder.iterdir() if path.name.startswith("step-")) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) >= 4
    for name in names[0]:
        one, other = (checkpoint.read(folder / name) for folder in folders)
        assert one.tensors.keys() == other.tensors.keys()
        for stem, tensors in one.tensors.items():
            assert tensors.keys() == other.tensors[stem].keys()
            assert all(torch.equal(value, other.tensors[stem][key]) for key, value in tensors.items()), stem


def test_a_spike_in_one_process_is_computed_again_by_all(pair: dict[str, Any]) -> None:
    own, others = (json.loads(text) for text in pair["spike"]["verdicts"])
    assert own == others
    for strategy, once, verdict, processes in own:
        assert verdict == ("not reproducible: hardware" if once else "reproducible: data or model"), strategy
        assert processes == ([1] if once else [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "seed: 0 in process 0, 1 in process 1"),
        ("learning rate", "optimizer.learning_rate: 0.01 in process 0, 0.02 in process 1"),
        ("resume", "--resume: False in process 0, True in process 1"),
        ("data", "data: 'content 0' in process 0, 'content 1' in process 1"),
    ],
)
def test_processes_that_differ_are_refused_at_the_start_everywhere(pair: dict[str, Any], name: str, text: str) -> None:
    found = pair["disagreement"][name]
    assert found["told"] == [f"the processes of a run must agree, but they differ in {text}"] * 2
    assert found["seconds"] < 10
    assert pair["disagreement"]["nothing"]["told"] == ["", ""]
    assert pair["disagreement"]["files"] == []


def test_the_failing_process_is_named(pair: dict[str, Any]) -> None:
    assert "process 1 of 2 failed: RuntimeError: the data of process 1 are gone" in pair["output"][0]
    assert all(code != 0 for code in pair["codes"])


def test_a_silent_process_is_not_waited_for_without_end() -> None:
    started = time.monotonic()
    processes = start_pair("-c", SILENT)
    output = processes[0].communicate(timeout=60)[0]
    processes[1].kill()
    processes[1].communicate(timeout=60)
    assert processes[0].returncode != 0
    assert "did not answer within 0.02 minutes (distributed.timeout_minutes)" in output
    assert time.monotonic() - started < 45


@pytest.mark.parametrize("accumulation", [1, 3, 4, 32])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("start", [0, 2])
def test_rounds_cover_the_order_once(accumulation: int, processes: int, start: int) -> None:
    order = [list(range(first, min(first + 5, 63))) for first in range(0, 63, 5)]
    todo = rounds(order, start, accumulation, processes)
    assert [index for one in todo for part in one.parts for index in part] == list(range(5 * start, 63))
    assert start + sum(one.batches for one in todo) == len(order)
    assert all(len(one.parts) == processes for one in todo)
    assert max(len(part) for one in todo for part in one.parts) <= 5
    assert todo[-1].closes
    assert all(one.share(rank) for one in todo for rank in range(processes))
    position = start
    for one in todo:
        position += one.batches
        assert one.closes == (position % accumulation == 0 or position == len(order))
        assert {part for parts in one.parts for part in parts} <= set(one.window)
    if processes == 1:
        assert [list(one.parts[0]) for one in todo] == order[start:]


def test_evaluation_batches_are_shared_and_padded() -> None:
    order = [[0, 1], [2], [3]]
    assert shared_order(order, 0, 1) == [([0, 1], True), ([2], True), ([3], True)]
    assert shared_order(order, 0, 2) == [([0, 1], True), ([3], True)]
    assert shared_order(order, 1, 2) == [([2], True), ([3], False)]


def test_a_world_of_one_needs_no_exchange() -> None:
    world = World()
    assert (world.rank, world.size, world.main, world.distributed) == (0, 1, True, False)
    assert world.maximum([1.0, 2.0]) == world.sum([1.0, 2.0]) == [1.0, 2.0]
    assert world.gather("a") == ["a"]
    assert world.on_main(lambda: 3) == world.broadcast(3) == 3
    with pytest.raises(KeyError, match="own failure"):
        world.together(lambda: {}["own failure"])


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerError, match="meeting the other processes"):
        World.join(minutes=0.01, cuda=False)


def test_strategy_may_change_on_resume() -> None:
    before, after = to_dict(cases.config("ddp")), to_dict(cases.config("fsdp2"))
    assert before != after
    assert changed_on_resume(before, after) == {}
