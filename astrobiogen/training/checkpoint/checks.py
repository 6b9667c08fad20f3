"""What a checkpoint must be before anything of it is used: names, kinds and sizes first, then every byte.

The manifest shows that the files are those that were written, not who wrote them: whoever can change a file can write
a manifest that fits. So whatever it says is checked before it is followed: names that lead out of the folder, pipes
and devices are refused, and nothing that is read can run.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors

from astrobiogen.data.storage.guarded import MIB, open_inside, read_bounded
from astrobiogen.training.errors import CheckpointError

MOST_MANIFEST = 16 * MIB
_CHUNK = MIB
Needs = Mapping[str, Iterable[str]]
# What bytes raise that match their checksums and are not what their names say.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError)


def read_manifest(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """The manifest's bytes and what they say, not yet believed.

    Raises:
        CheckpointError: no JSON object.
        OSError: missing, no regular file, or larger than any manifest.
    """
    with open_inside(folder, name) as file:
        raw = read_bounded(file, MOST_MANIFEST)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise CheckpointError(f"{folder / name} is not readable JSON: {error}") from error
    if not isinstance(body, dict) or "sha256" not in body:
        raise CheckpointError(f"{folder / name} is not a manifest")
    return raw, body


def files_of(folder: Path, body: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file as a manifest says them.

    Raises:
        CheckpointError: a key is missing or of another type than it must be.
    """
    files = body.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder}: 'files' in its manifest is {type(files).__name__}, expected an object")
    found = {}
    for name, entry in files.items():
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise CheckpointError(f"{folder}: {name!r} in its manifest lacks 'size' or 'sha256'")
        if len(PurePosixPath(name).parts) > 2 or PurePosixPath(name).suffix not in (".json", ".safetensors"):
            raise CheckpointError(f"{folder}: {name!r} in its manifest is no name of a file of a checkpoint")
        found[name] = (size, digest)
    return found


def check_file(folder: Path, name: str, size: int, digest: str) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        CheckpointError: it differs.
        OSError: missing, outside the folder, or no regular file.
    """
    with open_inside(folder, name) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise CheckpointError(f"{folder / name} has {found} bytes, its manifest says {size}")
        present = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            present.update(chunk)
    if present.hexdigest() != digest:
        raise CheckpointError(f"{folder / name} does not match its SHA-256")


def check_listed(folder: Path, names: Iterable[str]) -> None:
    """Refuse files in a folder of shards that the manifest does not list: whoever reads the folder would take them.

    Raises:
        CheckpointError: there is one.
    """
    listed = set(names)
    for part in {name.split("/")[0] for name in listed if "/" in name}:
        if extra := sorted({f"{part}/{found}" for found in os.listdir(folder / part)} - listed):
            raise CheckpointError(f"{folder / extra[0]} is not listed in the manifest")


def check_needed(folder: Path, names: Iterable[str], needs: Needs) -> None:
    """Whether a whole checkpoint holds what will be asked of it.

    Args:
        names: its files.
        needs: stem of a file of tensors -> keys that the JSON document of that stem must have, if any.

    Raises:
        CheckpointError: something is missing.
    """
    listed = set(names)
    for stem, keys in needs.items():
        tensors = any(name == f"{stem}.safetensors" or name.startswith(f"{stem}/") for name in listed)
        if not tensors or (keys and f"{stem}.json" not in listed):
            raise CheckpointError(f"{folder} holds no {stem!r}")
        if not keys:
            continue
        try:
            document = json.loads((folder / f"{stem}.json").read_bytes())
            missing = [key for key in keys if key not in document]
        except (OSError, *MALFORMED) as error:
            raise CheckpointError(f"{folder / stem}.json cannot be used: {error}") from error
        if missing:
            raise CheckpointError(f"{folder / stem}.json lacks {', '.join(map(repr, missing))}")
