"""Batches of few climates times few organisms, in which each climate cube and each metabolic graph is encoded once.

A climate cube has 1.5 million values and a graph some thousand nodes; the pairs of them are many more than the items.
In a random batch of
16 pairs nearly every pair brings its own cube and graph. Here the pairs of an epoch are ordered by random groups of
climates and, within a group, by organism, so that a batch of 16 holds about 4 to 5 of each. The gradient of a batch is
the same; which pairs meet in a batch is not.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from astrobiogen import data
from astrobiogen.training.batches import loading


class BlockSampler:
    """Every pair once per epoch, in batches of exactly `batch_size` (the last may be short); a function of (seed,
    epoch) only.

    Climates are permuted and cut into groups of `block`, pairs are sorted by (climate group, permuted organism), cut
    into batches, and the batches are permuted.

    Args:
        keys: (climate, organism) of each sample.
        block: climates per group, at least 1.
    """

    def __init__(self, keys: Sequence[tuple[str, str]], batch_size: int, seed: int, block: int) -> None:
        self._climates, self._climate = _numbered([key[0] for key in keys])
        self._organisms, self._organism = _numbered([key[1] for key in keys])
        self._batch_size, self._seed, self._block = batch_size, seed, block
        self.batches_per_epoch = -(-len(keys) // batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """Batches of `epoch` from number `start` on."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        climate = torch.randperm(self._climates, generator=generator)[self._climate] // self._block
        organism = torch.randperm(self._organisms, generator=generator)[self._organism]
        pairs = torch.argsort(climate * self._organisms + organism, stable=True).tolist()
        chunks = [pairs[first : first + self._batch_size] for first in range(0, len(pairs), self._batch_size)]
        order = torch.randperm(len(chunks), generator=generator).tolist()
        yield from (chunks[number] for number in order[start:])


def _numbered(names: Sequence[str]) -> tuple[int, torch.Tensor]:
    """Number of distinct names and the number of each."""
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return len(numbers), torch.tensor([numbers[name] for name in names], dtype=torch.long)


def keys_of(samples: data.HabitatDataset) -> list[tuple[str, str]]:
    """(climate, organism) of each sample."""
    return [(pair.climate, pair.organism) for pair in samples.pairs]


def in_blocks(samples: data.HabitatDataset, batch_size: int, block: int) -> list[list[int]]:
    """All samples in batches by groups of climates, then by organism, in their alphabetical order, for evaluation."""
    _, climate = _numbered([key[0] for key in keys_of(samples)])
    organisms, organism = _numbered([key[1] for key in keys_of(samples)])
    pairs = torch.argsort(climate // block * organisms + organism, stable=True).tolist()
    return [pairs[first : first + batch_size] for first in range(0, len(pairs), batch_size)]


def collate_shared(samples: Sequence[data.Sample], pad_id: int) -> loading.Batch:
    """The batch of `data.collate` with each distinct climate and graph once: `climate_index` and `graph_index` say
    which is whose.
    """
    nothing = (None,) * len(samples[0].epochs)
    light = [dataclasses.replace(sample, epochs=nothing, graph=None) for sample in samples]
    batch = data.collate(light, pad_id=pad_id, cube_shape=(1, 1, 1, 1, 1))
    climates, climate_index = _distinct([id(sample.epochs) for sample in samples])
    graphs, graph_index = _distinct([id(sample.graph) for sample in samples])
    cubes = data.collate([dataclasses.replace(samples[first], graph=None) for first in climates], pad_id=pad_id)
    networks = data.collate(
        [dataclasses.replace(light[first], graph=samples[first].graph) for first in graphs],
        pad_id=pad_id,
        cube_shape=(1, 1, 1, 1, 1),
    )
    modality_mask = batch["modality_mask"].clone()
    modality_mask[:, 0] = cubes["climate_mask"].any(1)[climate_index]
    modality_mask[:, 1] = networks["graph_mask"][graph_index]
    return batch | {
        "climate_datacube": cubes["climate_datacube"],
        "climate_mask": cubes["climate_mask"],
        "climate_index": climate_index,
        "metabolic_graph": networks["metabolic_graph"],
        "graph_index": graph_index,
        "graph_mask": modality_mask[:, 1].clone(),
        "modality_mask": modality_mask,
    }


def distinct_networks(samples: data.HabitatDataset, pad_id: int) -> Any:
    """The metabolic graphs of `samples`, each once, as a `torch_geometric` `Batch`."""
    first = {pair.organism: number for number, pair in reversed(list(enumerate(samples.pairs)))}
    chosen = [samples[number] for number in sorted(first.values())]
    nothing = (None,) * len(chosen[0].epochs)
    light = [dataclasses.replace(sample, epochs=nothing) for sample in chosen]
    return data.collate(light, pad_id=pad_id, cube_shape=(1, 1, 1, 1, 1))["metabolic_graph"]


def _distinct(names: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """Positions of the first of each distinct name, and for each position which of those it equals."""
    first: dict[int, int] = {}
    index = [first.setdefault(name, len(first)) for name in names]
    return [index.index(number) for number in range(len(first))], torch.tensor(index)
