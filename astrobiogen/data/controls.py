"""Data in which something that could give the answer away is hidden, to see what a result rests on."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from astrobiogen.data.dataset import HabitatDataset

NEAR_SURFACE_SIGMA = 0.8  # levels below this height (the lowest 2 km on Earth): three of the ten
TEMPERATURE = "ta"


def near_surface_levels(levels: tuple[float, ...]) -> list[int]:
    """Numbers of the sigma levels at or below ``NEAR_SURFACE_SIGMA``."""
    return [k for k, sigma in enumerate(levels) if sigma >= NEAR_SURFACE_SIGMA]


def _hidden(variable: int, levels: list[int], cube: Tensor) -> Tensor:
    copy = cube.clone()
    copy[variable][:, levels] = 0.0
    return copy


def without_near_surface(dataset: HabitatDataset) -> HabitatDataset:
    """The same samples with near-surface temperature replaced by its training mean (0 once standardised), in every
    epoch; humidity and the levels above stay. Climates are read and changed when a sample is used, as those of
    ``dataset`` are.

    The label is made of the later segment's *surface* temperature, which the input's lowest levels nearly are: what a
    model still knows without them comes from elsewhere.
    """
    spec, store = dataset.spec, dataset.store
    cubes = store.cubes.then(
        functools.partial(_hidden, spec.variables.index(TEMPERATURE), near_surface_levels(spec.levels))
    )
    planets = {
        key: dataclasses.replace(entry, epochs=entry.epochs.read_by(cubes)) for key, entry in store.planets.items()
    }
    changed = dataclasses.replace(store, planets=planets, cubes=cubes)
    return HabitatDataset(changed, dataset.pairs, dataset.name)
