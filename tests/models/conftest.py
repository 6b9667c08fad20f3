"""Fixtures: synthetic inputs for the model tests."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from astrobiogen.models import MultiModalTrainingConfig

SMALL_CUBE = (4, 3, 4, 8, 8)


def build_spec(grid: tuple[int, int, int, int, int] = SMALL_CUBE, vocabulary: int = 64, tokens: int = 12) -> Any:
    """A stand-in for the dataset's specification."""
    months, epochs, levels, rows, columns = grid
    return types.SimpleNamespace(
        variables=("ta", "hus"),
        level_bounds=tuple(level / levels for level in range(levels + 1)),
        latitude_bounds=tuple(90.0 - 180.0 * row / rows for row in range(rows + 1)),
        longitudes=tuple(360.0 * column / columns for column in range(columns)),
        months=months,
        n_epochs=epochs,
        cube_mean=((250.0,) * levels, (3e-3,) * levels),
        cube_std=((20.0,) * levels, (2e-3,) * levels),
        planet_param_names=tuple(f"p{index}" for index in range(7)),
        wavelengths=(0.2, 1.0, 20.0),
        node_features=64,
        laplacian_dim=16,
        random_walk_dim=8,
        vocab_size=vocabulary,
        max_text_tokens=tokens,
    )


def build_graph(metabolites: int, reactions: int, generator: torch.Generator, per_reaction: int = 4) -> Data:
    """A random metabolite-reaction graph with every attribute; half of a reaction's edges are substrates."""
    nodes = metabolites + reactions
    edge_index, stoichiometry = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0)
    if metabolites and reactions:
        reaction = torch.arange(reactions).repeat_interleave(per_reaction) + metabolites
        metabolite = torch.randint(metabolites, reaction.shape, generator=generator)
        substrate = torch.arange(reaction.shape[0]) % per_reaction < per_reaction // 2
        edge_index = torch.stack(
            [torch.where(substrate, metabolite, reaction), torch.where(substrate, reaction, metabolite)]
        )
        amount = torch.randint(1, 4, reaction.shape, generator=generator).float()
        stoichiometry = torch.where(substrate, -amount, amount)
    edges = edge_index.shape[1]
    reversible = torch.rand(max(reactions, 1), generator=generator) > 0.5
    flag = reversible.repeat_interleave(per_reaction)[:edges].float()
    return Data(
        x=torch.randn(nodes, 64, generator=generator),
        edge_index=edge_index,
        edge_attr=torch.stack([stoichiometry.sign() * stoichiometry.abs().log1p(), flag], dim=1),
        stoichiometry=stoichiometry,
        node_type=(torch.arange(nodes) >= metabolites).long(),
        laplacian_pe=0.1 * torch.randn(nodes, 16, generator=generator),
        random_walk_pe=torch.rand(nodes, 8, generator=generator),
        is_internal=torch.rand(nodes, generator=generator) > 0.2,
        elements=torch.ones(nodes, 8),
        formula_known=torch.ones(nodes, dtype=torch.bool),
        charge=torch.ones(nodes),
        charge_known=torch.ones(nodes, dtype=torch.bool),
    )


def build_batch(
    size: int,
    spec: Any,
    seed: int = 0,
    graph_sizes: tuple[tuple[int, int], ...] = ((6, 5), (3, 1), (9, 4)),
    wavelengths: int = 20,
) -> dict[str, Any]:
    """A batch with every key of the contract."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    levels, rows, columns = len(spec.level_bounds) - 1, len(spec.latitude_bounds) - 1, len(spec.longitudes)
    climate_mask = torch.ones(size, spec.n_epochs, dtype=torch.bool)
    climate_mask[::2, 0] = False
    cube = normal(size, 2, spec.months, spec.n_epochs, levels, rows, columns)
    cube = cube * climate_mask[:, None, None, :, None, None, None]
    graphs = [build_graph(*graph_sizes[index % len(graph_sizes)], generator) for index in range(size)]
    tokens = torch.randint(3, spec.vocab_size, (size, spec.max_text_tokens), generator=generator)
    lengths = torch.randint(3, spec.max_text_tokens + 1, (size, 1), generator=generator)
    attention = torch.arange(spec.max_text_tokens) < lengths
    wave = torch.linspace(0.2, 20.0, wavelengths).expand(size, -1)
    return {
        "run_ids": torch.arange(size),
        "planet_params": normal(size, len(spec.planet_param_names)),
        "planet_params_mask": torch.rand(size, len(spec.planet_param_names), generator=generator) > 0.1,
        "climate_datacube": cube,
        "climate_mask": climate_mask,
        "metabolic_graph": Batch.from_data_list(graphs),
        "graph_mask": torch.ones(size, dtype=torch.bool),
        "spectroscopy": torch.stack([wave, normal(size, wavelengths)], dim=-1),
        "spectroscopy_mask": torch.rand(size, wavelengths, generator=generator) > 0.1,
        "input_ids": tokens.masked_fill(~attention, 0),
        "attention_mask": attention,
        "labels": tokens.masked_fill(~attention, -100),
        "habitability_label": torch.arange(size) % 2,
        "habitability_fraction": torch.rand(size, generator=generator),
        "modality_mask": torch.ones(size, 5, dtype=torch.bool),
    }


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Any]]:
    """`build_batch`."""
    return build_batch


@pytest.fixture
def make_graph() -> Callable[..., Data]:
    """`build_graph`."""
    return build_graph


@pytest.fixture
def make_spec() -> Callable[..., Any]:
    """`build_spec`."""
    return build_spec


@pytest.fixture
def quiet() -> Callable[[MultiModalTrainingConfig], MultiModalTrainingConfig]:
    """A configuration without any dropout, and without its counterpart in evaluation: training and evaluation agree."""

    def silence(config: MultiModalTrainingConfig) -> MultiModalTrainingConfig:
        return dataclasses.replace(
            config,
            llm_config=dataclasses.replace(config.llm_config, dropout=0.0),
            graph_config=dataclasses.replace(config.graph_config, dropout=0.0),
            cnn_config=dataclasses.replace(config.cnn_config, dropout=0.0),
            fusion_config=dataclasses.replace(
                config.fusion_config, dropout=0.0, modality_dropout=0.0, modality_dropouts={}
            ),
            text_share=1.0,
            spectrum_config=dataclasses.replace(config.spectrum_config, dropout=0.0),
            planet_config=dataclasses.replace(config.planet_config, dropout=0.0),
        )

    return silence


@pytest.fixture
def saved_bytes() -> Callable[[Callable[[], torch.Tensor]], int]:
    """Bytes of the distinct storages that autograd keeps for the backward pass of a function, parameters left out."""

    def measure(function: Callable[[], torch.Tensor]) -> int:
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            root = tensor if tensor._base is None else tensor._base  # a transposed parameter is still a parameter
            if not isinstance(root, torch.nn.Parameter) and not tensor.is_leaf:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function()  # keeps the graph, and so the storages and their addresses, alive
        del result
        return sum(held.values())

    return measure


@pytest.fixture
def spec() -> Any:
    """Small axes."""
    return build_spec()
