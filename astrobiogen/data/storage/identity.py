"""What a dataset holds, as one digest: a resumed run, and the processes of a run, know by it that they see the same."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import Any

from torch import Tensor

from astrobiogen.data.dataset import DatasetBundle, OrganismEntry, PlanetEntry
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs

_LOG = logging.getLogger("astrobiogen")
_TELL_SECONDS = 15.0


class _Digest:
    """SHA-256 of parts, each with its kind and length before it: no two sequences of parts are the same bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Take in a tensor, or anything whose ``repr`` tells all."""
        if isinstance(value, Tensor):
            whole = value.detach().cpu().contiguous()
            kind, data = f"{whole.dtype} {tuple(whole.shape)}", whole.numpy().tobytes()
        else:
            kind, data = "repr", repr(value).encode()
        self._hash.update(f"{kind}|{len(data)}|".encode())
        self._hash.update(data)

    def hex(self) -> str:
        """What was taken in."""
        return self._hash.hexdigest()


class _Climates:
    """Digests of climate cubes: of the packed file where there is one, which was verified when the pack was loaded,
    else of the values. Each is read once.
    """

    def __init__(self, total: int) -> None:
        self._known: dict[tuple[int, str], str] = {}
        self._total, self._told = total, time.monotonic()

    def of(self, name: str, cubes: CubeCache) -> str:
        """The digest of cube ``name``."""
        key = id(cubes), name
        if key not in self._known:
            self._known[key] = cubes.stored(name) if cubes.stored is not None else _of_tensor(cubes.get(name))
            if time.monotonic() - self._told > _TELL_SECONDS:
                self._told = time.monotonic()
                _LOG.info("digest of the data: read %d climates of about %d", len(self._known), self._total)
        return self._known[key]


def _of_tensor(value: Tensor) -> str:
    digest = _Digest()
    digest.add(value)
    return digest.hex()


def _planet(digest: _Digest, entry: PlanetEntry, climates: _Climates) -> None:
    epochs: Any = entry.epochs
    if isinstance(epochs, LazyEpochs):
        digest.add([None if name is None else climates.of(name, epochs.cubes) for name in epochs.names])
    else:
        digest.add([None if epoch is None else _of_tensor(epoch) for epoch in epochs])
    digest.add((entry.run_id, entry.text, sorted(entry.metadata.items())))
    for value in (entry.params, entry.params_mask, entry.spectrum, entry.spectrum_mask):
        digest.add(value)


def _organism(digest: _Digest, entry: OrganismEntry) -> None:
    digest.add((entry.text, sorted(entry.metadata.items())))
    graph = entry.graph
    if graph is None or (entry.stored is not None and entry.stored[0] is graph):
        digest.add(None if graph is None or entry.stored is None else entry.stored[1])
        return
    for name, value in sorted(graph.to_dict().items()):
        digest.add(name)
        digest.add(value)


def content_digest(bundle: DatasetBundle) -> str:
    """SHA-256, in hexadecimal, of all that a model is trained, validated and tested on: the pairs of every split in
    their order with labels, and of each climate and organism in them cubes, network, spectrum, parameters, text and
    names; axes, statistics and tokenizer. Not of where it lies.

    Of what was read from a pack the digests in its manifest are taken, which were compared with the files on loading
    (0.02 s for the bundled data); of what was made in memory the values.
    """
    digest = _Digest()
    digest.add(json.dumps(bundle.statistics(), sort_keys=True))
    sets = {"train": bundle.train, "validation": bundle.validation, **bundle.test_cells}
    for name, samples in sets.items():
        digest.add((name, len(samples.pairs)))
        for pair in samples.pairs:
            digest.add(pair)
    pairs = [pair for samples in sets.values() for pair in samples.pairs]
    planets, organisms = bundle.train.store.planets, bundle.train.store.organisms
    used = sorted({pair.climate for pair in pairs})
    climates = _Climates(len(used))
    for key in used:
        digest.add(key)
        _planet(digest, planets[key], climates)
    for key in sorted({pair.organism for pair in pairs}):
        digest.add(key)
        _organism(digest, organisms[key])
    return digest.hex()
