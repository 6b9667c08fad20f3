"""Checkpoints: whatever happens to a file or in the middle of a save, an older whole checkpoint is used and said so."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

from astrobiogen.training.checkpoint import CheckpointStore, Content, packing, read, verify
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError


def content(number: int) -> Content:
    generator = torch.Generator().manual_seed(number)
    weight = torch.randn(40, 3, generator=generator)
    tensors = {
        "model": {"a.weight": weight, "tied": weight, "half": weight.bfloat16(), "strided": weight.t()},
        "training": {},
    }
    document = packing.pack({"step": number, "rng": runtime.rng_state()}, tensors["training"])
    return Content(tensors, {"training": document})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for number in (1, 2):
        store.save(number, content(number))
    return store


def newest(store: CheckpointStore) -> int:
    found = CheckpointStore(store.root, store.keep).load_newest()
    assert found is not None
    return int(found[1].documents["training"]["step"])


def test_round_trip(store: CheckpointStore) -> None:
    loaded = read(store.candidates()[0])
    expected = content(2)
    for name, value in expected.tensors["model"].items():
        assert torch.equal(value, loaded.tensors["model"][name]), name
        assert value.dtype == loaded.tensors["model"][name].dtype
    state = packing.unpack(loaded.documents["training"], loaded.tensors["training"])
    runtime.set_rng_state(state["rng"])
    first = (random.random(), torch.rand(3))
    runtime.set_rng_state(state["rng"])
    assert first[0] == random.random()
    assert torch.equal(first[1], torch.rand(3))
    assert (store.root / "latest").read_text().strip() == "step-00000002"


def files_of(store: CheckpointStore) -> list[Path]:
    return sorted(store.candidates()[0].iterdir())


def test_every_truncation_is_detected(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    for path in files_of(store):
        whole = path.read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            caplog.clear()
            assert newest(store) == 1, f"{path.name} cut to {length}"
            assert "falling back" in caplog.text
        path.write_bytes(whole)
    assert newest(store) == 2


def test_every_flipped_byte_is_detected(store: CheckpointStore) -> None:
    generator = random.Random(0)
    folder, flips = store.candidates()[0], 0
    for path in files_of(store):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(60))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify(folder)
            flips += 1
        path.write_bytes(whole)
    assert flips > 200
    verify(folder)


def test_missing_files_and_no_whole_checkpoint(store: CheckpointStore) -> None:
    (store.candidates()[0] / "model.safetensors").unlink()
    assert newest(store) == 1
    (store.candidates()[1] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        store.load_newest()
    assert CheckpointStore(store.root.parent / "empty", 2).load_newest() is None


def test_other_format_is_refused(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astrobiogen.training.checkpoint.store.FORMAT", 99)
    with pytest.raises(CheckpointError, match="format 2, this version reads 99"):
        verify(store.candidates()[0])


def test_prune_counts_only_whole_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for number in (9, 10, 100):  # text order would put 9 last
        store.save(number, content(number))
    assert [path.name for path in store.candidates()] == ["step-00000100", "step-00000010"]
    (store.candidates()[0] / "training.json").write_text("{}")
    fresh = CheckpointStore(tmp_path, keep=2)
    with caplog.at_level(logging.WARNING):
        fresh.save(101, content(101))
    assert [path.name for path in fresh.candidates()] == ["step-00000101", "step-00000100", "step-00000010"]
    assert newest(fresh) == 101


def test_same_step_twice(store: CheckpointStore) -> None:
    again = store.save(2, content(5))
    assert again.name == "step-00000002-r1"
    assert newest(store) == 5


@pytest.mark.parametrize("stage", ["wrote model.safetensors", "wrote training.json", "before commit"])
def test_full_disk_keeps_the_old_ones(tmp_path: Path, stage: str) -> None:
    def observer(now: str) -> None:
        if armed and now == stage:
            raise OSError(28, "No space left on device")

    armed: list[bool] = []
    store = CheckpointStore(tmp_path, keep=2, observer=observer)
    store.save(1, content(1))
    armed.append(True)
    with pytest.raises(OSError, match="No space left"):
        store.save(2, content(2))
    assert newest(store) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_leftovers_of_a_kill_are_cleaned(store: CheckpointStore) -> None:
    shutil.copytree(store.candidates()[0], store.root / "step-00000009.tmp-abcd")
    shutil.copytree(store.candidates()[0], store.root / "deleting-abcd")
    (store.root / "latest.tmp-abcd").write_text("x")
    assert newest(store) == 2
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_pack_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"state\.a\.1: got object"):
        packing.pack({"a": [1, object()]}, {})
    tree = {"x": (1, 2.5, None), 3: [True, "s"], "t": torch.arange(3)}
    tensors: dict[str, torch.Tensor] = {}
    back = packing.unpack(json.loads(json.dumps(packing.pack(tree, tensors))), tensors)
    assert back["x"] == (1, 2.5, None)
    assert back[3] == [True, "s"]
    assert torch.equal(back["t"], torch.arange(3))
