"""SYNTHETIC data with the layout of the real pack, for tests of shapes and training code. Random numbers; never a
result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from astrobiogen.data import splits
from astrobiogen.data.dataset import DatasetBundle, HabitatDataset, OrganismEntry, PairEntry, PlanetEntry, Store
from astrobiogen.data.labels import CLASS_THRESHOLD
from astrobiogen.data.networks import features, geometric
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs
from astrobiogen.data.text import SPECIAL_TOKENS, TextEncoder

if TYPE_CHECKING:
    from torch_geometric.data import Data

_LEVELS, _LATITUDES, _LONGITUDES, _MONTHS, _EPOCHS, _WAVELENGTHS = 10, 32, 64, 12, 3, 256
_PARAMS = tuple(f"parameter_{k}" for k in range(14))
_WORDS = tuple(f"word{k}" for k in range(60))
_PLANETS, _ORGANISMS = 8, 10


def _tokenizer() -> Tokenizer:
    vocabulary = {token: k for k, token in enumerate((*SPECIAL_TOKENS, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_spec() -> DataSpec:
    """Spec of the synthetic bundle: the real axes, unit statistics, a vocabulary of 64 words."""
    edges = np.linspace(0.0, 1.0, _LEVELS + 1)
    bounds = np.linspace(90.0, -90.0, _LATITUDES + 1)
    zero, one = tuple([0.0] * _LEVELS), tuple([1.0] * _LEVELS)
    return DataSpec(
        variables=("ta", "hus"),
        units=("K", "kg kg-1"),
        levels=tuple(((edges[1:] + edges[:-1]) / 2).tolist()),
        level_bounds=tuple(edges.tolist()),
        latitudes=tuple(((bounds[1:] + bounds[:-1]) / 2).tolist()),
        latitude_bounds=tuple(bounds.tolist()),
        longitudes=tuple(np.arange(0.0, 360.0, 360.0 / _LONGITUDES).tolist()),
        months=_MONTHS,
        n_epochs=_EPOCHS,
        planet_param_names=_PARAMS,
        planet_param_units=tuple(["1"] * len(_PARAMS)),
        wavelengths=tuple(np.geomspace(0.3, 2.4, _WAVELENGTHS).tolist()),
        vocab_size=len(SPECIAL_TOKENS) + len(_WORDS),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        sep_id=3,
        max_text_tokens=32,
        cube_mean=(tuple([250.0] * _LEVELS), zero),
        cube_std=(tuple([30.0] * _LEVELS), tuple([0.005] * _LEVELS)),
        param_mean=tuple([0.0] * len(_PARAMS)),
        param_std=tuple([1.0] * len(_PARAMS)),
        spectrum_mean=0.0,
        spectrum_std=one[0],
        class_threshold=CLASS_THRESHOLD,
        fitted_on=("synthetic",),
    )


def make_graph(generator: np.random.Generator, metabolites: int, reactions: int) -> Data:
    """Random bipartite network: each reaction takes one to three metabolites and makes one to three others."""
    edges: list[tuple[int, int]] = []
    amounts: list[float] = []
    for j in range(reactions):
        used = generator.permutation(metabolites)[: int(generator.integers(2, 6))]
        taken = int(generator.integers(1, len(used)))
        for k, i in enumerate(used.tolist()):
            edges.append((i, metabolites + j) if k < taken else (metabolites + j, i))
            amounts.append(-1.0 if k < taken else 1.0)
    n = metabolites + reactions
    is_reaction = np.arange(n) >= metabolites
    x = generator.random((n, features.NODE_FEATURES), np.float32) * (
        generator.random((n, features.NODE_FEATURES)) < 0.2
    )
    x[:, 0], x[:, 1] = ~is_reaction, is_reaction
    signed = np.array(amounts, np.float32)
    attributes = np.stack([np.sign(signed) * np.log1p(np.abs(signed)), np.zeros_like(signed)], axis=1)
    counts = generator.integers(0, 20, (n, 8)) * ~is_reaction[:, None]
    return geometric.graph(
        x=torch.from_numpy(x.astype(np.float32)),
        edge_index=torch.tensor(edges, dtype=torch.long).T.contiguous(),
        edge_attr=torch.from_numpy(attributes.astype(np.float32)),
        stoichiometry=torch.from_numpy(signed),
        node_type=torch.from_numpy(is_reaction.astype(np.int64)),
        laplacian_pe=torch.from_numpy(generator.uniform(-1, 1, (n, 16)).astype(np.float32)),
        random_walk_pe=torch.from_numpy(generator.random((n, 8), np.float32)),
        is_internal=torch.from_numpy(~is_reaction & (generator.random(n) < 0.9)),
        elements=torch.from_numpy(counts.astype(np.float32)),
        formula_known=torch.from_numpy(~is_reaction & (generator.random(n) < 0.5)),
        charge=torch.zeros(n),
        charge_known=torch.from_numpy(~is_reaction),
        num_nodes=n,
    )


def _planets(generator: np.random.Generator, spec: DataSpec) -> tuple[dict[str, PlanetEntry], CubeCache]:
    v, t, g, lev, lat, lon = spec.cube_shape
    wave = torch.tensor(spec.wavelengths, dtype=torch.float32)
    out: dict[str, PlanetEntry] = {}
    made: dict[str, Tensor] = {}
    cubes = CubeCache(made.__getitem__, 0)  # they are in memory
    for p in range(_PLANETS):
        warmth = float(generator.normal())
        names = [f"synthetic{p}_g{k}" for k in range(g)]
        for name in names:
            values = 0.3 * generator.standard_normal((v, t, lev, lat, lon)) + warmth
            made[name] = torch.from_numpy(values.astype(np.float32))
        params = torch.from_numpy(np.array([warmth, *generator.standard_normal(len(_PARAMS) - 1)], np.float32))
        for k in range(g):
            mask = torch.ones(len(_PARAMS), dtype=torch.bool)
            mask[-1] = p % 2 == 0
            has_spectrum = torch.full((spec.n_wavelengths,), p == 0)
            albedo = torch.from_numpy(generator.standard_normal(spec.n_wavelengths).astype(np.float32))
            history = LazyEpochs((*([None] * (g - 1 - k)), *names[: k + 1]), cubes)
            words = " ".join(generator.choice(_WORDS, 8).tolist())
            key = f"synthetic{p}_g{k}"
            metadata = {"planet": f"synthetic{p}", "star_system": f"synthetic star {p}", "epoch": k, "climate": key}
            spectrum = torch.stack([wave, torch.where(has_spectrum, albedo, 0.0)], dim=1)
            out[key] = PlanetEntry(
                p * g + k, torch.where(mask, params, 0.0), mask, history, spectrum, has_spectrum, words, metadata
            )
    return out, cubes


def make_bundle(n: int, seed: int) -> DatasetBundle:
    """SYNTHETIC bundle of ``n`` training samples (pairs repeat from about 80 on) with every cell filled.

    S grows with the planet's first parameter and differs by organism, so that a model can learn something; nothing in
    it is physical.

    Args:
        n: Training samples, at least 1; validation and each test cell get max(2, n // 4), at most 64.
        seed: Seed of the random numbers.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    generator = np.random.default_rng(seed)
    spec = make_spec()
    planets, cubes = _planets(generator, spec)
    organisms = {
        f"synthetic organism {o}": OrganismEntry(
            make_graph(generator, int(generator.integers(20, 40)), int(generator.integers(15, 40))),
            " ".join(generator.choice(_WORDS, 8).tolist()),
            {"organism": f"synthetic organism {o}", "species": f"species {o}", "genus": f"genus {o}"},
        )
        for o in range(_ORGANISMS)
    }
    encoder = TextEncoder(_tokenizer(), spec.max_text_tokens)
    tokens = encoder.encode_pairs(
        {k: p.text for k, p in planets.items()}, {k: o.text for k, o in organisms.items()}, "synthetic"
    )
    cells: dict[str, list[PairEntry]] = {cell: [] for cell in splits.CELLS}
    offset = dict(zip(organisms, generator.normal(0.0, 0.7, _ORGANISMS).tolist(), strict=True))
    for climate, planet in planets.items():
        for o, organism in enumerate(organisms):
            fraction = float(np.clip(0.15 + 0.15 * (planet.params[0].item() + offset[organism]), 0.0, 1.0))
            new_planet, new_organism = int(planet.metadata["planet"][-1]) >= 6, o >= 7
            draw = splits.unit_hash(f"{planet.metadata['planet']}|{organism}")
            inside = splits.VALIDATION if draw < 0.15 else "seen" if draw < 0.3 else splits.TRAIN
            cell = (
                "new_both"
                if new_planet and new_organism
                else "new_planet"
                if new_planet
                else "new_organism"
                if new_organism
                else inside
            )
            cells[cell].append(PairEntry(climate, organism, fraction, int(fraction >= CLASS_THRESHOLD), cell))
    store = Store(spec, planets, organisms, tokens, cubes)
    sets = {}
    for cell, pairs in cells.items():
        order = generator.permutation(len(pairs)).tolist()
        size = n if cell == splits.TRAIN else min(64, max(2, n // 4))
        sets[cell] = HabitatDataset(store, [pairs[order[i % len(order)]] for i in range(size)], cell)
    test = {cell: sets[cell] for cell in splits.TEST_CELLS}
    return DatasetBundle(sets[splits.TRAIN], sets[splits.VALIDATION], test, spec, {"root": "SYNTHETIC", "seed": seed})
