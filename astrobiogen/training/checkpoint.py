"""Checkpoints that survive kill -9, full disks and flipped bits.

A checkpoint is a folder `step-<n>` of safetensors and JSON files and a `manifest.json` with their sizes and SHA-256.
The protocol:

1. write every file into `step-<n>.tmp-<random>` and fsync each; 2. write the manifest and fsync it; 3. fsync the
folder; 4. rename it to `step-<n>` (the moment of commit); 5. fsync the parent; 6. point `latest` at it (write aside,
fsync, rename); 7. only now prune old ones, and never the newest `keep` that verify. Loading verifies every byte and
falls back, newest first, to one that is whole. No pickle anywhere.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from astrobiogen.training import packing
from astrobiogen.training.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d+)(?:-r(\d+))?")
_CHUNK = 1 << 20
_LOG = logging.getLogger("astrobiogen")

Observer = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        tensors: file stem -> named tensors, e.g. ``{"model": {...}, "training": {...}}``; each becomes
            `<stem>.safetensors`.
        documents: file stem -> JSON data; each becomes `<stem>.json`.
    """

    tensors: Mapping[str, dict[str, torch.Tensor]]
    documents: Mapping[str, Any]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _sealed(body: dict[str, Any]) -> bytes:
    """The manifest's bytes: `body` and its own SHA-256, so that a change anywhere in the manifest shows too."""
    return _json_bytes(body | {"sha256": hashlib.sha256(_json_bytes(body)).hexdigest()})


def _rank(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def verify(folder: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: what is missing or differs.
    """
    manifest = folder / MANIFEST
    try:
        raw = manifest.read_bytes()
        body = json.loads(raw)
        if not isinstance(body, dict) or "sha256" not in body:
            raise CheckpointError(f"{manifest} is not a manifest")
        body.pop("sha256")
        if raw != _sealed(body):
            raise CheckpointError(f"{manifest} does not match its own checksum")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {body['format']}, this version reads {FORMAT}")
        for name, expected in body["files"].items():
            path = folder / name
            size = path.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected['size']}")
            if _sha256(path) != expected["sha256"]:
                raise CheckpointError(f"{path} does not match its SHA-256")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise CheckpointError(f"{manifest} is not readable JSON: {error}") from error
    return body


def read(folder: Path) -> Content:
    """Verify a checkpoint and load all of it onto the CPU.

    Raises:
        CheckpointError: it is not whole.
    """
    body = verify(folder)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    documents: dict[str, Any] = {}
    for name in body["files"]:
        path = folder / name
        if path.suffix == ".json":
            documents[path.stem] = json.loads(path.read_bytes())
            continue
        with safetensors.safe_open(path, framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        tensors[path.stem] = packing.share(safetensors.torch.load_file(path), aliases)
    return Content(tensors, documents)


class CheckpointStore:
    """The checkpoints of one run in one folder.

    Args:
        root: folder of the checkpoints; made if it is not there.
        keep: how many verified checkpoints survive pruning.
        observer: told each stage of a save by name, so that a test can fail or kill the process there.
        writable: False only reads: nothing is made or cleaned up, so that a run which is saving is not disturbed.
    """

    def __init__(self, root: Path, keep: int, observer: Observer | None = None, *, writable: bool = True) -> None:
        self.root = root
        self.keep = keep
        self._observer = observer or (lambda _stage: None)
        self._good: set[Path] = set()
        if not writable:
            return
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise CheckpointError(f"{root} cannot be used for checkpoints: {error}") from error

    def _clean(self) -> None:
        """Remove what an interrupted save or prune has left; nothing with a committed name is touched."""
        for path in self.root.iterdir():
            if ".tmp-" in path.name or path.name.startswith("deleting-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def candidates(self) -> list[Path]:
        """Committed checkpoints, newest first, not yet verified."""
        found = [path for path in self.root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found, key=_rank, reverse=True)

    def _free_name(self, step: int) -> Path:
        path, repeat = self.root / f"step-{step:08d}", 0
        while path.exists():
            repeat += 1
            path = self.root / f"step-{step:08d}-r{repeat}"
        return path

    def save(self, step: int, content: Content) -> Path:
        """Store `content` as the checkpoint of `step` and return its folder.

        Raises:
            OSError: the disk is full, read-only, ...; what was stored before is untouched and no partial checkpoint is
                left.
        """
        final = self._free_name(step)
        temporary = self.root / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir()
            self._fill(temporary, step, content)
            self._observer("before commit")
            temporary.rename(final)
        except (OSError, safetensors.SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, f"safetensors could not write: {error}") from error
        self._observer("after commit")
        _fsync(self.root)
        self._good.add(final)
        self._point(final)
        self._observer("before prune")
        self.prune()
        self._observer("after prune")
        return final

    def _fill(self, folder: Path, step: int, content: Content) -> None:
        for stem, tensors in content.tensors.items():
            stored, aliases = packing.unshare(tensors)
            path = folder / f"{stem}.safetensors"
            safetensors.torch.save_file(stored, path, metadata={"aliases": json.dumps(aliases)})
            _fsync(path)
            self._observer(f"wrote {path.name}")
        for stem, document in content.documents.items():
            _write(folder / f"{stem}.json", _json_bytes(document))
            self._observer(f"wrote {stem}.json")
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
        body = {"format": FORMAT, "step": step, "files": files, "torch": torch.__version__}
        _write(folder / MANIFEST, _sealed(body))
        _fsync(folder)

    def _point(self, final: Path) -> None:
        aside = self.root / f"{LATEST}.tmp-{uuid.uuid4().hex[:8]}"
        _write(aside, f"{final.name}\n".encode())
        aside.rename(self.root / LATEST)
        _fsync(self.root)

    def _is_good(self, folder: Path) -> bool:
        if folder not in self._good:
            try:
                verify(folder)
            except CheckpointError as error:
                _LOG.warning("%s; it is left out of the count of checkpoints to keep", error)
                return False
            self._good.add(folder)
        return True

    def prune(self) -> None:
        """Delete checkpoints older than the newest `keep` that verify."""
        good = 0
        for folder in self.candidates():
            if good < self.keep:
                good += self._is_good(folder)
                continue
            # Renamed first: a kill in the middle of the deletion leaves no half checkpoint under a committed name.
            doomed = self.root / f"deleting-{uuid.uuid4().hex[:8]}"
            folder.rename(doomed)
            shutil.rmtree(doomed)
            self._good.discard(folder)

    def load_newest(self) -> tuple[Path, Content] | None:
        """The newest checkpoint that verifies, or None if there is no checkpoint at all. Each bad one on the way is
        named in a warning.

        Raises:
            CheckpointError: there are checkpoints, but not one is whole.
        """
        candidates = self.candidates()
        for folder in candidates:
            try:
                content = read(folder)
            except CheckpointError as error:
                _LOG.warning("checkpoint skipped: %s; falling back to an older one", error)
                continue
            self._good.add(folder)
            return folder, content
        if candidates:
            raise CheckpointError(f"none of the {len(candidates)} checkpoints in {self.root} is whole")
        return None
