"""Samples, datasets and the bundle that training sees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs
from astrobiogen.data.text import PairTokens

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True)
class Sample:
    """One (planet, target epoch, organism); tensors are shared with the store and must not be written to.

    Attributes:
        run_id: Row number of the climate.
        planet_params, planet_params_mask: float32 [P] standardised (0 where missing), bool [P].
        epochs: G entries, each float32 [V, T, lev, lat, lon] standardised, or None where the planet has no such epoch;
            the last is the target. Read when an entry is asked for (``lazy.LazyEpochs``); the same object for all
            samples of a climate.
        graph: PyG ``Data`` of the metabolic network, or None.
        spectrum, spectrum_mask: float32 [W, 2] (wavelength in um, standardised albedo), bool [W].
        input_ids: long [L], without padding; empty where there is no text.
        text: The words behind ``input_ids``.
        label, fraction: Class 0/1 and S in [0, 1].
        metadata: planet, star_system, epoch, organism, species, genus, cell.
    """

    run_id: int
    planet_params: Tensor
    planet_params_mask: Tensor
    epochs: Sequence[Tensor | None]
    graph: Data | None
    spectrum: Tensor
    spectrum_mask: Tensor
    input_ids: Tensor
    text: str
    label: int
    fraction: float
    metadata: dict[str, Any]

    @property
    def has_climate(self) -> bool:
        """Whether there is any epoch; reads none."""
        if isinstance(self.epochs, LazyEpochs):
            return any(self.epochs.present)
        return any(epoch is not None for epoch in self.epochs)


@dataclass(frozen=True)
class PlanetEntry:
    """Everything of one climate (planet, epoch) that its samples share."""

    run_id: int
    params: Tensor
    params_mask: Tensor
    epochs: LazyEpochs
    spectrum: Tensor
    spectrum_mask: Tensor
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class OrganismEntry:
    """Everything of one organism that its samples share; ``stored``: the graph that was read from a packed file, and
    that file's SHA-256.
    """

    graph: Data | None
    text: str
    metadata: dict[str, Any]
    stored: tuple[Data, str] | None = None


@dataclass(frozen=True)
class PairEntry:
    """One sample by keys: climate, organism, S, class, cell."""

    climate: str
    organism: str
    fraction: float
    label: int
    cell: str


@dataclass(frozen=True)
class Store:
    """What all datasets of a bundle share; ``tokens``: input ids by (climate, organism); ``cubes``: where the climates
    are read; ``library``: every spectrum [W, 2] and mask [W] by name, also those of no climate.
    """

    spec: DataSpec
    planets: Mapping[str, PlanetEntry]
    organisms: Mapping[str, OrganismEntry]
    tokens: PairTokens
    cubes: CubeCache
    library: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class HabitatDataset(Dataset[Sample]):
    """Pairs of one split cell.

    Args:
        store: Decoded data.
        pairs: Rows of this dataset.
        name: Split cell, for messages.
    """

    def __init__(self, store: Store, pairs: Sequence[PairEntry], name: str) -> None:
        self.store = store
        self.pairs = tuple(pairs)
        self.name = name

    @property
    def spec(self) -> DataSpec:
        """The spec of the bundle."""
        return self.store.spec

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; no copy is made (a collated batch is). Raises IndexError outside ``-len .. len - 1``."""
        pair = self.pairs[index]
        planet, organism = self.store.planets[pair.climate], self.store.organisms[pair.organism]
        return Sample(
            planet.run_id,
            planet.params,
            planet.params_mask,
            planet.epochs,
            organism.graph,
            planet.spectrum,
            planet.spectrum_mask,
            self.store.tokens[pair.climate, pair.organism],
            f"{planet.text} {organism.text}".strip(),
            pair.label,
            pair.fraction,
            {**planet.metadata, **organism.metadata, "cell": pair.cell},
        )

    def labels(self) -> Tensor:
        """long [n] of classes."""
        return torch.tensor([pair.label for pair in self.pairs], dtype=torch.long)

    def fractions(self) -> Tensor:
        """float32 [n] of S."""
        return torch.tensor([pair.fraction for pair in self.pairs], dtype=torch.float32)


@dataclass(frozen=True)
class DatasetBundle:
    """Train, validation and the test cells ("seen", "new_planet", "new_organism", "new_both") with their spec and
    provenance.
    """

    train: HabitatDataset
    validation: HabitatDataset
    test_cells: dict[str, HabitatDataset]
    spec: DataSpec
    provenance: dict[str, Any]

    def statistics(self) -> dict[str, Any]:
        """What a model needs beside its weights to read other data as it was trained, in JSON's types: ``spec`` (axes,
        units, means and deviations; ``DataSpec.from_json``) and ``tokenizer`` (``tokenizers.Tokenizer.from_str``).
        """
        tokenizer = self.train.store.tokens.tokenizer
        return {"spec": json.loads(self.spec.to_json()), "tokenizer": json.loads(tokenizer.to_str())}

    @property
    def test(self) -> HabitatDataset:
        """All test cells in one dataset."""
        pairs = [pair for cell in self.test_cells.values() for pair in cell.pairs]
        return HabitatDataset(self.train.store, pairs, "test")
