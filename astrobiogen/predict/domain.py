"""Whether an input lies where the training data lie: its distance to the nearest training climate or network, held
against the distances of the training ones from each other.

Three distances are looked at, each over numbers that the model reads: the planet's parameters; means of the target
epoch's cube over four latitude bands, by variable and level; means of the network's node features and its size. A
distance is the root mean square of the differences, each divided by the feature's standard deviation over the training
items. The limit is the largest distance of a training item from its nearest other one (leave-one-out): what is further
away is nearer to no training item than the loneliest of them is to its neighbour.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from astrobiogen import data
from astrobiogen.data.dataset import OrganismEntry, PlanetEntry

_BANDS = 4
Floats = NDArray[np.float64]
WORDS = {
    "parameters": "planet parameters",
    "climate": "temperature and humidity",
    "network": "composition of the network",
}


@dataclasses.dataclass(frozen=True)
class Region:
    """Where the training items lie.

    Attributes:
        items: their features [n, F]; NaN where one is not known.
        scale: standard deviation of each feature [F], 1 where it does not vary.
        limit: largest leave-one-out distance.
    """

    items: Floats
    scale: Floats
    limit: float

    @classmethod
    def of(cls, items: Floats) -> "Region":
        """The region of `items` [n, F], n at least 2."""
        spread = np.nanstd(items, axis=0)
        scale = np.where(spread > 1e-6, spread, 1.0)
        alone = cls(items, scale, 0.0)
        nearest = [cls(np.delete(items, k, axis=0), scale, 0.0).distance(item) for k, item in enumerate(items)]
        return dataclasses.replace(alone, limit=float(np.max(nearest)))

    def distance(self, item: Floats) -> float:
        """Distance of `item` [F] from the nearest training item, over the features that both know; infinite where they
        share none."""
        squares = ((self.items - item) / self.scale) ** 2
        known = np.isfinite(squares)
        counts = known.sum(axis=1)
        means = np.where(counts > 0, np.where(known, squares, 0.0).sum(axis=1) / np.maximum(counts, 1), np.inf)
        return float(np.sqrt(means.min()))


@dataclasses.dataclass(frozen=True)
class Domain:
    """The regions of the training data, by the names of `WORDS`."""

    regions: dict[str, Region]

    @classmethod
    def of(cls, training: data.HabitatDataset) -> "Domain":
        """Of the climates and networks of the training pairs."""
        store = training.store
        climates = [store.planets[key] for key in sorted({pair.climate for pair in training.pairs})]
        networks = [store.organisms[key] for key in sorted({pair.organism for pair in training.pairs})]
        return cls(
            {
                "parameters": Region.of(np.stack([parameters(entry) for entry in climates])),
                "climate": Region.of(np.stack([climate(entry) for entry in climates])),
                "network": Region.of(np.stack([network(entry) for entry in networks if entry.graph is not None])),
            }
        )

    def of_climate(self, entry: PlanetEntry) -> dict[str, float]:
        """Distances of a climate, by region."""
        found = {"parameters": parameters(entry), "climate": climate(entry)}
        return {name: self.regions[name].distance(values) for name, values in found.items()}

    def of_network(self, entry: OrganismEntry) -> dict[str, float]:
        """Distance of a network."""
        return {"network": self.regions["network"].distance(network(entry))}

    def reasons(self, distances: dict[str, float]) -> list[str]:
        """What lies outside, in words; empty where nothing does."""
        return [
            f"{WORDS[name]} {value:.2f} from the nearest of the training data, whose own distances reach "
            f"{self.regions[name].limit:.2f}"
            for name, value in distances.items()
            if value > self.regions[name].limit
        ]


def parameters(entry: PlanetEntry) -> Floats:
    """Standardised planet parameters [P], NaN where unknown."""
    return np.where(entry.params_mask.numpy(), entry.params.numpy(), np.nan).astype(np.float64)


def climate(entry: PlanetEntry) -> Floats:
    """Means of the target epoch over time, longitude and four latitude bands [V · lev · 4], in training deviations."""
    cube = entry.epochs[-1]
    assert cube is not None, "the target epoch is always there"
    zonal = cube.double().mean(dim=(1, 4))
    return torch.nn.functional.adaptive_avg_pool1d(zonal, _BANDS).flatten().numpy()


def network(entry: OrganismEntry) -> Floats:
    """Mean node features of metabolites and of reactions, and log sizes."""
    graph = entry.graph
    assert graph is not None, "a network that was read"
    x, reaction = graph["x"].double().numpy(), graph["node_type"].numpy() == 1
    sizes = np.log1p([reaction.sum(), (~reaction).sum(), graph["edge_index"].shape[1]])
    return np.concatenate([x[~reaction].mean(axis=0), x[reaction].mean(axis=0), sizes])
