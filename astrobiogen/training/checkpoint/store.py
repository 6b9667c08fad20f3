"""Checkpoints that survive kill -9, full disks and flipped bits.

A checkpoint is a folder `step-<n>` of safetensors and JSON files and a `manifest.json` with their sizes and SHA-256.
The protocol:

One or several processes save and load together. Files of a process of its own (`process-<rank>.*`) are written by it,
shards by all (`<stem>/`), the rest by process 0.

1. write every file into `step-<n>.tmp-<random>` and fsync each; 2. write the manifest and fsync it; 3. fsync the
folder; 4. rename it to `step-<n>` (the moment of commit); 5. fsync the parent; 6. point `latest` at it (write aside,
fsync, rename); 7. only now prune old ones, and never the newest `keep` that verify. Loading verifies every byte and
falls back, newest first, to one that is whole. No pickle anywhere.
"""

import dataclasses
import datetime
import functools
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

from astrobiogen.training.checkpoint import checks, likeness, packing, shards, tensor_files
from astrobiogen.training.checkpoint.checks import MALFORMED, Needs
from astrobiogen.training.distributed import World
from astrobiogen.training.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest"
PROCESS = "process-"
_NAME = re.compile(r"step-(\d+)(?:-r(\d+))?")
_CHUNK = 1 << 20
_LOG = logging.getLogger("astrobiogen")

Observer = Callable[[str], None]
Reference = Callable[[str, str], torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        tensors: file stem -> named tensors, e.g. ``{"model": {...}, "training": {...}}``; each becomes
            `<stem>.safetensors`, or the folder `<stem>` if it holds shards.
        documents: file stem -> JSON data; each becomes `<stem>.json`. Stems `process-<rank>`, here and in `tensors`,
            belong to that process; with several processes each gives its own only, and reads those of all.
        metrics: the run's last figures by name, for people: they are in the manifest, beside the time of the save, and
            nothing reads them back.
    """

    tensors: Mapping[str, dict[str, torch.Tensor]]
    documents: Mapping[str, Any]
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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


def _remove(path: Path) -> None:
    """Delete a folder or file; of one that was moved elsewhere and linked, the link: the rest is its mover's."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _rank(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def verify(folder: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint against its manifest and return the manifest.

    Raises:
        CheckpointError: what is missing or differs; a name that leads out of the folder; a pipe or a device.
    """
    try:
        raw, body = checks.read_manifest(folder, MANIFEST)
        body.pop("sha256")
        if raw != _sealed(body):
            raise CheckpointError(f"{folder / MANIFEST} does not match its own checksum")
        if body.get("format") != FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {body.get('format')}, this version reads {FORMAT}")
        files = checks.files_of(folder, body)
        checks.check_listed(folder, files)
        for name, (size, digest) in files.items():
            checks.check_file(folder, name, size, digest)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return body


def read(folder: Path, reference: Reference = lambda _stem, _name: None) -> Content:
    """Verify a checkpoint and load all of it onto the CPU.

    Args:
        reference: see `CheckpointStore.load_newest`.

    Raises:
        CheckpointError: it is not whole.
    """
    return _load(folder, verify(folder), reference)


def _load(folder: Path, body: dict[str, Any], reference: Reference) -> Content:
    try:
        return _loaded(folder, body, reference)
    except MALFORMED as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} matches its checksums, but cannot be loaded: {text}") from error


def _loaded(folder: Path, body: dict[str, Any], reference: Reference) -> Content:
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    documents: dict[str, Any] = {}
    for stem in sorted({name.split("/")[0] for name in body["files"] if "/" in name}):
        tensors[stem] = shards.read(folder / stem, functools.partial(reference, stem))
    for name in body["files"]:
        path = folder / name
        if "/" in name:
            continue
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
        world: the processes that save and load together, all on one file system; default: this one alone.
        writable: False only reads: nothing is made or cleaned up, so that a run which is saving is not disturbed.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        observer: Observer | None = None,
        world: World | None = None,
        *,
        writable: bool = True,
    ) -> None:
        self.root = root
        self.keep = keep
        self._observer = observer or (lambda _stage: None)
        self._world = world or World()
        self._good: set[Path] = set()
        if writable:
            self._world.on_main(self._open)

    def _open(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be used for checkpoints: {error}") from error

    def _clean(self) -> None:
        """Remove what an interrupted save or prune has left; nothing with a committed name is touched."""
        for path in self.root.iterdir():
            if ".tmp-" in path.name or path.name.startswith("deleting-"):
                _remove(path)

    def candidates(self) -> list[Path]:
        """Committed checkpoints, newest first, not yet verified."""
        found = [path for path in self.root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
        return sorted(found, key=_rank, reverse=True)

    def _free_name(self, step: int) -> Path:
        path, repeat = self.root / f"step-{step:08d}", 0
        while os.path.lexists(path):
            repeat += 1
            path = self.root / f"step-{step:08d}-r{repeat}"
        return path

    def save(self, step: int, content: Content) -> Path:
        """Store `content` as the checkpoint of `step` and return its folder; every process must call it.

        Raises:
            OSError: the disk is full, read-only, ... in some process; raised in all. What was stored before is
                untouched and no partial checkpoint is left.
        """
        world = self._world
        final = world.broadcast(self._free_name(step))
        temporary = world.broadcast(self.root / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        sharded = [stem for stem, tensors in content.tensors.items() if shards.is_sharded(tensors)]
        try:
            world.on_main(lambda: [path.mkdir() for path in (temporary, *(temporary / stem for stem in sharded))])
            for stem in sharded:
                shards.write(temporary / stem, content.tensors[stem], world)
            entries = world.together(lambda: self._fill(temporary, content, sharded))
            files = {name: entry for own in entries for name, entry in own.items()}
            body = {"step": step, "files": files, "metrics": dict(content.metrics)}
            world.on_main(lambda: self._commit(temporary, final, body))
        except OSError:
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return world.on_main(lambda: self._publish(final))

    def _commit(self, temporary: Path, final: Path, body: dict[str, Any]) -> None:
        """Write the manifest and rename."""
        saved = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _write(temporary / MANIFEST, _sealed(body | {"format": FORMAT, "saved": saved, "torch": torch.__version__}))
        for folder in sorted({(temporary / name).parent for name in body["files"]} | {temporary}):
            _fsync(folder)
        self._observer("before commit")
        temporary.rename(final)

    def _publish(self, final: Path) -> Path:
        """What follows the commit. The checkpoint is there: what fails here must not say that it is not."""
        self._good.add(final)
        try:
            self._observer("after commit")
            _fsync(self.root)
            self._point(final)
            self._observer("before prune")
            self.prune()
            self._observer("after prune")
        except OSError as error:
            _LOG.warning("%s is saved, but what follows a save failed: %s", final, error)
        return final

    def _fill(self, folder: Path, content: Content, sharded: list[str]) -> dict[str, dict[str, Any]]:
        """Write the files that are this process's to write; their sizes and hashes."""
        world, digests = self._world, dict[Path, str]()
        written = [path for stem in sharded for path in shards.own_files(folder / stem, world.rank)]
        for path in written:
            _fsync(path)
        for stem, tensors in content.tensors.items():
            if stem in sharded or not self._writes(stem):
                continue
            stored, aliases = packing.unshare(tensors)
            path = folder / f"{stem}.safetensors"
            digests[path] = tensor_files.write(path, stored, {"aliases": json.dumps(aliases)})
            written.append(path)
            self._observer(f"wrote {path.name}")
        for stem, document in content.documents.items():
            if self._writes(stem):
                _write(folder / f"{stem}.json", _json_bytes(document))
                written.append(folder / f"{stem}.json")
                self._observer(f"wrote {stem}.json")
        return {
            path.relative_to(folder).as_posix(): {
                "size": path.stat().st_size,
                "sha256": digests.get(path) or _sha256(path),
            }
            for path in written
        }

    def _writes(self, stem: str) -> bool:
        return self._world.main or stem == f"{PROCESS}{self._world.rank}"

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
            _remove(doomed)
            self._good.discard(folder)

    def load_newest(
        self,
        reference: Reference = lambda _stem, _name: None,
        needs: Needs | None = None,
        like: Mapping[str, Any] | None = None,
    ) -> tuple[Path, Content] | None:
        """The newest checkpoint that verifies, or None if there is no checkpoint at all. Each bad one on the way is
        named in a warning. Every process must call it; process 0 verifies.

        Args:
            reference: (file stem, name) -> the tensor that the read one will replace, if known: of a shard only this
                process's part is read.
            needs: file stem -> keys that its JSON document must have; a checkpoint without them is passed over, too.
            like: file stem -> what its JSON document must be like, see `likeness.check`; else it is passed over, too.

        Raises:
            CheckpointError: there are checkpoints, but not one is whole.
        """
        found = self._world.on_main(lambda: self._newest_whole(needs or {}, like or {}))
        if found is None:
            return None
        folder, body = found
        return folder, _load(folder, body, reference)

    def _newest_whole(self, needs: Needs, like: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
        candidates = self.candidates()
        for folder in candidates:
            try:
                body = verify(folder)
                checks.check_needed(folder, body["files"], needs)
                for stem, document in like.items():
                    likeness.check(folder, stem, document)
            except CheckpointError as error:
                _LOG.warning("checkpoint skipped: %s; falling back to an older one", error)
                continue
            self._good.add(folder)
            return folder, body
        if candidates:
            raise CheckpointError(f"none of the {len(candidates)} checkpoints in {self.root} is whole")
        return None
