"""Flat features for baselines of scikit-learn."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astrobiogen.data.dataset import HabitatDataset, OrganismEntry, PlanetEntry

_BANDS, _SECTORS, _SEASONS = 4, 4, 2
_SPECTRUM_BINS, _TOKEN_BUCKETS = 16, 64
_TEMPERATURE = "ta"
_THRESHOLDS = np.linspace(-2.5, 3.0, 28)  # standard deviations of the temperature
_QUANTILES = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])


def _cube_features(epoch: Tensor | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Means of one epoch over 2 half segments, 4 latitude bands and 4 longitude sectors per variable and level, and
    one flag of presence.
    """
    v, t, lev, lat, lon = shape
    if epoch is None:
        return np.zeros(v * _SEASONS * lev * _BANDS * _SECTORS + 1, np.float32)
    parts = epoch.reshape(v, _SEASONS, t // _SEASONS, lev, _BANDS, lat // _BANDS, _SECTORS, lon // _SECTORS).mean(
        dim=(2, 5, 7)
    )
    return np.append(parts.numpy().ravel(), np.float32(1.0))


def _spectrum_features(planet: PlanetEntry) -> NDArray[np.float32]:
    values = planet.spectrum[:, 1].numpy()
    means = [chunk.mean() for chunk in np.array_split(values, _SPECTRUM_BINS)]
    return np.array([*means, planet.spectrum_mask.any().item()], np.float32)


def _planet_features(planet: PlanetEntry, shape: tuple[int, ...]) -> NDArray[np.float32]:
    params = np.concatenate([planet.params.numpy(), planet.params_mask.numpy().astype(np.float32)])
    return np.concatenate(
        [params, *(_cube_features(epoch, shape) for epoch in planet.epochs), _spectrum_features(planet)]
    )


def _graph_features(organism: OrganismEntry) -> NDArray[np.float32]:
    """Mean node features of metabolites and of reactions, open-uptake gases, log sizes; zeros when there is no
    network.
    """
    graph = organism.graph
    if graph is None:
        return np.zeros(131, np.float32)
    x, reaction = graph["x"].numpy(), graph["node_type"].numpy() == 1
    sizes = np.log1p([reaction.sum(), (~reaction).sum(), graph["edge_index"].shape[1]])
    return np.concatenate([x[~reaction].mean(axis=0), x[reaction].mean(axis=0), sizes]).astype(np.float32)


def _token_features(ids: Tensor) -> NDArray[np.float32]:
    counts = np.bincount(ids.numpy() % _TOKEN_BUCKETS, minlength=_TOKEN_BUCKETS)
    return np.log1p(counts).astype(np.float32)


def baseline_features(
    dataset: HabitatDataset,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Inputs of every modality as flat vectors, in the order of the dataset.

    Only what a sample shows the model enters: standardised planet parameters, coarse means of the input segment's cube
    (each epoch), the spectrum in 16 bins, means of the network's node features, and hashed token counts. No label-
    segment field, growth range or identity.

    Returns:
        params float32 [n, P]; flat float32 [n, F]; classes int64 [n]; S float32 [n].
    """
    store = dataset.store
    v, t, _, lev, lat, lon = store.spec.cube_shape
    climates = sorted({p.climate for p in dataset.pairs})  # epochs of a planet together: each climate is read once
    planet = {k: _planet_features(store.planets[k], (v, t, lev, lat, lon)) for k in climates}
    organism = {k: _graph_features(store.organisms[k]) for k in {p.organism for p in dataset.pairs}}
    row = partial(_row, dataset, planet, organism)
    flat = np.stack([row(k) for k in range(len(dataset))]) if len(dataset) else np.zeros((0, 0), np.float32)
    params = [store.planets[pair.climate].params for pair in dataset.pairs]
    stacked = torch.stack(params).numpy() if params else np.zeros((0, store.spec.n_planet_params), np.float32)
    return stacked, flat, dataset.labels().numpy(), dataset.fractions().numpy()


def _row(
    dataset: HabitatDataset,
    planet: dict[str, NDArray[np.float32]],
    organism: dict[str, NDArray[np.float32]],
    index: int,
) -> NDArray[np.float32]:
    pair = dataset.pairs[index]
    tokens = _token_features(dataset.store.tokens[pair.climate, pair.organism])
    return np.concatenate([planet[pair.climate], organism[pair.organism], tokens])


def summary_features(dataset: HabitatDataset) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a scientist would tell of a sample by hand, in the order of the dataset.

    Of the last epoch's lowest level: the shares of area and time that are warmer than 28 thresholds, the mean and 7
    quantiles of temperature, weighted by area, and whether the epoch is present. Of the organism: means of the
    network's node features. No identity, and nothing of the label's segment.

    Returns:
        climate float32 [n, 37]; network float32 [n, 131].
    """
    store = dataset.store
    planet = {k: _temperature_summary(dataset, store.planets[k]) for k in sorted({p.climate for p in dataset.pairs})}
    organism = {k: _graph_features(store.organisms[k]) for k in {p.organism for p in dataset.pairs}}
    climate = [planet[pair.climate] for pair in dataset.pairs]
    network = [organism[pair.organism] for pair in dataset.pairs]
    if not climate:
        return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
    return np.stack(climate), np.stack(network)


def _temperature_summary(dataset: HabitatDataset, planet: PlanetEntry) -> NDArray[np.float32]:
    spec = dataset.store.spec
    epoch = list(planet.epochs)[-1]
    if epoch is None or _TEMPERATURE not in spec.variables:
        return np.zeros(_THRESHOLDS.size + _QUANTILES.size + 2, np.float32)
    field = epoch[spec.variables.index(_TEMPERATURE), :, -1].numpy().astype(np.float64)  # [month, lat, lon]
    area = np.diff(np.sin(np.radians(np.sort(np.asarray(spec.latitude_bounds)))))[::-1]
    weight = np.broadcast_to(area[:, None], field.shape).ravel() / (area.sum() * field.shape[0] * field.shape[2])
    order = np.argsort(field, axis=None)
    warmer = [(weight * (field.ravel() > threshold)).sum() for threshold in _THRESHOLDS]
    quantiles = np.interp(_QUANTILES, weight[order].cumsum(), field.ravel()[order])
    return np.array([*warmer, (weight * field.ravel()).sum(), *quantiles, 1.0], np.float32)
