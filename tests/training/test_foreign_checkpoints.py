"""Checkpoints that someone else has made, moved or linked: nothing outside is read, nothing hangs, nothing is lost."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from astrobiogen import evaluate
from astrobiogen.training.checkpoint import MANIFEST, CheckpointStore, Content, read, tensor_files, verify
from astrobiogen.training.config import CheckpointConfig
from astrobiogen.training.errors import CheckpointError
from tests.training.conftest import toy_config
from tests.training.test_checkpoint import content, newest


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for number in (1, 2):
        made.save(number, content(number))
    return made


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it anew, as anyone can."""
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    del body["sha256"]
    change(body)
    plain = json.dumps(body, indent=1, sort_keys=True).encode()
    body["sha256"] = hashlib.sha256(plain).hexdigest()
    path.unlink()
    path.write_bytes(json.dumps(body, indent=1, sort_keys=True).encode())


def entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("name", ["../../secret.json", "/etc/hostname", "a/../../../secret.json", "", "a/b/c.json"])
def test_names_that_lead_out_are_refused(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = store.candidates()[0]
    reseal(folder, lambda body: body["files"].update({name: entry(tmp_path / "secret.json")}))
    with pytest.raises(CheckpointError, match="no name of a file"):
        verify(folder)
    assert newest(store) == 1


def test_links_out_are_refused_and_links_inside_followed(store: CheckpointStore, tmp_path: Path) -> None:
    folder = store.candidates()[0]
    path = folder / "training.json"
    moved = path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(moved)
    with pytest.raises(CheckpointError, match="leads out"):
        verify(folder)
    path.unlink()
    moved.rename(folder / "other.json")
    path.symlink_to("other.json")
    verify(folder)


@pytest.mark.parametrize("name", ["training.json", "model.safetensors", MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_pipes_and_devices_are_refused_at_once(store: CheckpointStore, name: str, kind: str) -> None:
    path = store.candidates()[0] / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"a pipe|leads out|a folder"):
        verify(path.parent)
    assert newest(store) == 1


def test_a_device_in_the_folder_itself_is_refused(store: CheckpointStore) -> None:
    path = store.candidates()[0] / "training.json"
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device needs root")
    with pytest.raises(CheckpointError, match="a device"):
        verify(path.parent)


_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format": lambda body: body.pop("format"),
    "no files": lambda body: body.pop("files"),
    "files are a list": lambda body: body.update(files=[]),
    "no size": lambda body: body["files"]["training.json"].pop("size"),
    "no digest": lambda body: body["files"]["training.json"].pop("sha256"),
    "an entry is a number": lambda body: body["files"].update({"training.json": 3}),
    "size is text": lambda body: body["files"]["training.json"].update(size="3"),
    "no model": lambda body: body["files"].pop("model.safetensors"),
    "no state": lambda body: body["files"].pop("training.json"),
    "an unlisted kind": lambda body: body["files"].update({"run.py": entry(Path(__file__))}),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES.keys())
def test_a_manifest_that_lacks_something_falls_back(
    change: Callable[[dict[str, Any]], Any], make_run: Any, tmp_path: Path
) -> None:
    config = toy_config(epochs=2, checkpoint=CheckpointConfig(every_epochs=1, every_minutes=0.0))
    make_run(config).trainer.fit()
    first, second = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    reseal(second, change)
    run = make_run(config)
    assert run.trainer.saver.resume()
    assert run.trainer.progress.epoch == 1, first


def test_a_state_that_lacks_something_falls_back(make_run: Any, tmp_path: Path) -> None:
    config = toy_config(epochs=2, checkpoint=CheckpointConfig(every_epochs=1, every_minutes=0.0))
    make_run(config).trainer.fit()
    second = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[1]
    path = second / "training.json"
    document = json.loads(path.read_text())
    del document["progress"]
    path.write_text(json.dumps(document))
    reseal(second, lambda body: body["files"].update({"training.json": entry(path)}))
    run = make_run(config)
    run.trainer.saver.resume()
    assert run.trainer.progress.epoch == 1


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and elements below a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in ((*path, key), *places(item, (*path, key)))]


def changed(path: Path, place: tuple[Any, ...], new: Any) -> None:
    """Take out what is at `place` in a JSON file of a checkpoint (`new` None), or put `new` there; reseal."""
    document = json.loads(path.read_text())
    *before, last = place
    inner = functools.reduce(lambda value, key: value[key], before, document)
    if new is None:
        del inner[last]
    else:
        inner[last] = new
    path.write_text(json.dumps(document))
    reseal(path.parent, lambda body: body["files"].update({"training.json": entry(path)}))


@pytest.mark.parametrize("new", [None, "text", []], ids=["missing", "text", "a list"])
def test_a_state_that_lacks_something_anywhere_falls_back_or_is_refused(
    make_run: Any, tmp_path: Path, new: Any
) -> None:
    config = toy_config(epochs=2, checkpoint=CheckpointConfig(every_epochs=1, every_minutes=0.0))
    make_run(config).trainer.fit()
    path = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[1] / "training.json"
    whole, manifest = path.read_bytes(), (path.parent / MANIFEST).read_bytes()
    fell_back, refused = 0, []
    for place in places(json.loads(whole)):
        if "python" in place[:2] and len(place) > 5:  # one of the 625 words of a generator is like the other
            continue
        changed(path, place, new)
        run = make_run(config)
        try:
            run.trainer.saver.resume()
            fell_back += run.trainer.progress.epoch == 1
        except CheckpointError as error:
            refused.append((place, str(error)))
        path.write_bytes(whole)
        (path.parent / MANIFEST).write_bytes(manifest)
    named = {place[0] for place, _ in refused}
    assert fell_back > 25
    assert "progress" not in named, refused


def test_bytes_that_match_but_are_no_tensors_are_one_clear_error(store: CheckpointStore) -> None:
    folder = store.candidates()[0]
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    reseal(folder, lambda body: body["files"].update({"model.safetensors": entry(folder / "model.safetensors")}))
    verify(folder)
    with pytest.raises(CheckpointError, match="matches its checksums, but cannot be loaded"):
        read(folder)


def test_a_manifest_nested_without_end_is_refused(store: CheckpointStore) -> None:
    (store.candidates()[0] / MANIFEST).write_text('{"sha256":' + "[" * 200_000)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        verify(store.candidates()[0])
    assert newest(store) == 1


def test_a_checkpoint_that_was_moved_and_linked_is_resumed_and_pruned(
    make_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_config(epochs=1, checkpoint=CheckpointConfig(every_epochs=1, every_minutes=0.0, keep=2))
    run = make_run(config)
    run.trainer.fit()
    saver, folder = run.trainer.saver, tmp_path / "run" / "checkpoints"
    path = next(folder.glob("step-*"))
    path.rename(tmp_path / "large-disk")
    path.symlink_to(tmp_path / "large-disk")
    again = make_run(config)
    assert again.trainer.saver.resume()
    for _ in range(3):  # the link is the oldest of `keep` + 1, then pruned
        assert saver.save("test")
    assert "NOT saved" not in caplog.text
    assert not path.is_symlink()
    assert (tmp_path / "large-disk" / MANIFEST).exists()  # only the link was ours
    assert len(list(folder.glob("step-*"))) == 2
    assert make_run(config).trainer.saver.resume()


def test_links_left_by_a_killed_prune_and_broken_links_do_not_stop_a_resume(
    store: CheckpointStore, tmp_path: Path
) -> None:
    (tmp_path / "away").mkdir()
    (store.root / "deleting-abcd").symlink_to(tmp_path / "away")
    (store.root / "step-00000003").symlink_to(tmp_path / "gone")
    assert newest(store) == 2
    assert (tmp_path / "away").is_dir()
    assert not (store.root / "deleting-abcd").is_symlink()
    assert CheckpointStore(store.root, 3).save(3, content(3)).name == "step-00000003-r1"


def test_what_fails_after_the_commit_is_not_called_unsaved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def observer(stage: str) -> None:
        if stage == "before prune":
            raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, keep=2, observer=observer)
    with caplog.at_level(logging.WARNING):
        verify(store.save(1, content(1)))
    assert "is saved, but what follows a save failed" in caplog.text


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = CheckpointStore(tmp_path, keep=2).save(1, content(1))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_our_files_are_what_the_library_writes(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    tensors = {f"{kind}": torch.arange(7).to(kind) for kind in (*kinds, torch.int8, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "map": torch.randn(3, 4, 5)}
    digest = tensor_files.write(tmp_path / "ours", tensors, {"aliases": "{}"})
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"aliases": "{}"})
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    loaded = safetensors.torch.load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with pytest.raises(TypeError, match=r"z: got torch\.complex64"):
        tensor_files.write(tmp_path / "bad", {"z": torch.zeros(1, dtype=torch.complex64)}, {})


def test_unlisted_shards_are_refused(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path, keep=2).save(1, Content({"model": {"a": torch.ones(2)}}, {"training": {}}))
    (folder / "more").mkdir()
    (folder / "more" / "shard-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    name = "more/shard-00001.safetensors"
    reseal(folder, lambda body: body["files"].update({name: entry(folder / name)}))
    verify(folder)
    (folder / "more" / "shard-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not listed in the manifest"):
        verify(folder)


@pytest.mark.parametrize(
    ("stem", "best", "message"),
    [
        ("other", {}, ": holds no configuration"),
        ("model", {"epoch": 0}, ": holds no configuration"),
        ("other", {"config": {"epochs": 3}}, ": holds no weights"),
        ("model", {"config": {"epochs": 3}}, " does not say how far its weights are trained: no 'epoch'"),
    ],
)
def test_evaluate_says_what_a_checkpoint_lacks(tmp_path: Path, stem: str, best: dict[str, Any], message: str) -> None:
    folder = CheckpointStore(tmp_path, keep=2).save(1, Content({stem: {"a": torch.ones(2)}}, {"best": best}))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert evaluate.main([str(folder)]) == 1
    assert f"error: {folder}{message}" in errors.getvalue()
