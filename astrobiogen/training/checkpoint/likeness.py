"""Whether the JSON document of a checkpoint has what will be read of it, at every level."""

import json
from pathlib import Path
from typing import Any

import safetensors

from astrobiogen.training.checkpoint.checks import MALFORMED
from astrobiogen.training.checkpoint.packing import ITEMS, TENSOR
from astrobiogen.training.errors import CheckpointError


def check(folder: Path, stem: str, like: Any) -> None:
    """Compare a document with `like`, one of its kind as `packing.pack` makes it: what is a mapping there must be one
    here with at least its keys, what is a number a number, and each tensor that it names must be in its file. Mappings
    with other keys than names (an optimizer's moments) must have entries that are all alike.

    Raises:
        CheckpointError: the first place where something is missing or of another type.
    """
    try:
        document = json.loads((folder / f"{stem}.json").read_bytes())
        wrong = _difference(like, document, stem) or _unlike_entries(document, stem)
        if not wrong:
            stored = _stored(folder, stem)
            lost = set() if stored is None else _tensors(document) - stored
            wrong = f"{min(lost)!r} is not in {stem}.safetensors" if lost else ""
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{folder / stem}.json cannot be used: {error}") from error
    if wrong:
        raise CheckpointError(f"{folder / stem}.json cannot be used: {wrong}")


def _difference(like: Any, found: Any, place: str) -> str:
    """What `found` lacks that `like` has; empty if nothing."""
    if isinstance(like, dict) and not any(key.startswith("__") for key in like):
        if not isinstance(found, dict):
            return f"{place} is {type(found).__name__}, expected keys and values"
        for key, value in like.items():
            if key not in found:
                return f"{place} lacks {key!r}"
            if wrong := _difference(value, found[key], f"{place}.{key}"):
                return wrong
        return ""
    kind = (int, float) if isinstance(like, int | float) else type(like)
    fits = like is None or found is None or isinstance(found, kind)
    return "" if fits else f"{place} is {found!r:.60}, expected {type(like).__name__}"


def _unlike_entries(found: Any, place: str) -> str:
    """Where entries of a mapping with other keys than names have not the same keys inside; empty if nowhere."""
    if isinstance(found, list):
        found = dict(enumerate(found))
    if not isinstance(found, dict):
        return ""
    entries = [value for _, value in found.get(ITEMS, ()) if isinstance(value, dict)]
    every = set().union(*entries)
    for entry in entries:
        if lacks := sorted(every - entry.keys()):
            return f"an entry of {place} lacks {lacks[0]!r}"
    return next(filter(None, (_unlike_entries(value, f"{place}.{key}") for key, value in found.items())), "")


def _tensors(found: Any) -> set[str]:
    """Names of the tensors that a document refers to."""
    if isinstance(found, list):
        return set().union(*map(_tensors, found))
    if not isinstance(found, dict):
        return set()
    return {found[TENSOR]} if TENSOR in found else set().union(*map(_tensors, found.values()))


def _stored(folder: Path, stem: str) -> set[str] | None:
    """Names in the file of tensors beside a document; None where they are in shards, which are read by name."""
    file = folder / f"{stem}.safetensors"
    if not file.exists():
        return None if (folder / stem).is_dir() else set()
    with safetensors.safe_open(file, framework="pt") as opened:
        return {*opened.keys(), *json.loads((opened.metadata() or {}).get("aliases", "{}"))}
