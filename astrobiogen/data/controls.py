"""Data in which something that could give the answer away is hidden, to see what a result rests on."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from astrobiogen.data.dataset import HabitatDataset, PlanetEntry

NEAR_SURFACE_SIGMA = 0.8  # levels below this height (the lowest 2 km on Earth): three of the ten
TEMPERATURE = "ta"


def near_surface_levels(levels: tuple[float, ...]) -> list[int]:
    """Numbers of the sigma levels at or below ``NEAR_SURFACE_SIGMA``."""
    return [k for k, sigma in enumerate(levels) if sigma >= NEAR_SURFACE_SIGMA]


def without_near_surface(dataset: HabitatDataset) -> HabitatDataset:
    """The same samples with near-surface temperature replaced by its training mean (0 once standardised), in every
    epoch; humidity and the levels above stay.

    The label is made of the later segment's *surface* temperature, which the input's lowest levels nearly are: what a
    model still knows without them comes from elsewhere.
    """
    spec, store = dataset.spec, dataset.store
    variable, hidden = spec.variables.index(TEMPERATURE), near_surface_levels(spec.levels)
    done: dict[int, Tensor] = {}  # an epoch is shared by the climates that follow it

    def masked(epoch: Tensor | None) -> Tensor | None:
        if epoch is None:
            return None
        if id(epoch) not in done:
            copy = epoch.clone()
            copy[variable][:, hidden] = 0.0
            done[id(epoch)] = copy
        return done[id(epoch)]

    used = {pair.climate for pair in dataset.pairs}
    planets: dict[str, PlanetEntry] = {
        key: dataclasses.replace(entry, epochs=tuple(masked(e) for e in entry.epochs))
        for key, entry in store.planets.items()
        if key in used
    }
    changed = dataclasses.replace(store, planets=planets)
    return HabitatDataset(changed, dataset.pairs, dataset.name)
