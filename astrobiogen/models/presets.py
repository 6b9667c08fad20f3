"""Named sizes of the multi-modal model, fitted to a dataset's axes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

from astrobiogen.models.datacube.config import DatacubeConfig
from astrobiogen.models.graph.vae import GraphVAEConfig
from astrobiogen.models.llm_config import LLMConfig
from astrobiogen.models.multimodal_integration import FusionConfig
from astrobiogen.models.planet_encoder import PlanetParameterConfig
from astrobiogen.models.spectrum_encoder import SpectrumConfig
from astrobiogen.models.system_config import MultiModalTrainingConfig


class SpecLike(Protocol):
    """What a preset must know about the data; `astrobiogen.data.DataSpec` has it."""

    @property
    def variables(self) -> Sequence[str]: ...
    @property
    def level_bounds(self) -> Sequence[float]: ...
    @property
    def latitude_bounds(self) -> Sequence[float]: ...
    @property
    def longitudes(self) -> Sequence[float]: ...
    @property
    def months(self) -> int: ...
    @property
    def n_epochs(self) -> int: ...
    @property
    def cube_mean(self) -> Sequence[Sequence[float]]: ...
    @property
    def cube_std(self) -> Sequence[Sequence[float]]: ...
    @property
    def planet_param_names(self) -> Sequence[str]: ...
    @property
    def wavelengths(self) -> Sequence[float]: ...
    @property
    def node_features(self) -> int: ...
    @property
    def laplacian_dim(self) -> int: ...
    @property
    def random_walk_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_text_tokens(self) -> int: ...


def tiny(spec: SpecLike) -> MultiModalTrainingConfig:
    """For a laptop CPU and few samples: head dimension 68 as in the original, everything else small.

    Organisms and planets are few, so the network learns their names besides what they have in common. The network is
    hidden in half of the training samples, the planet parameters and the text in three quarters, labels are smoothed,
    and three quarters of the answer come from the summaries of climate and network (docs/models.md). All of it was
    chosen on groups held out of the training set (docs/log.md). Reading a quarter of the texts also halves the time of
    an update.
    """
    return MultiModalTrainingConfig(
        llm_config=LLMConfig(
            hidden_size=136, num_attention_heads=2, num_kv_heads=1, num_layers=2, intermediate_size=256,
            tie_word_embeddings=True, dropout=0.1, **_text(spec),
        ),
        graph_config=GraphVAEConfig(
            hidden_dim=32, latent_dim=16, num_layers=2, heads=4, global_tokens=1, edge_dim=16, dropout=0.0, beta=0.01,
            beta_warmup_steps=50, **_nodes(spec),
        ),
        cnn_config=DatacubeConfig(
            base_channels=16, max_channels=32, depth=2, feature_dim=64, dropout=0.1, embed_dim=32, num_heads=2,
            num_transformer_layers=1, statistics_thresholds=16, **_cube(spec, (3, 1, 2, 4, 8)),
        ),
        fusion_config=FusionConfig(
            fusion_dim=64, num_attention_heads=4, num_fusion_layers=1, num_latents=2, modality_dropout=0.1,
            modality_dropouts={"graph": 0.5, "planet_params": 0.75},
            dropout=0.2,
        ),
        spectrum_config=SpectrumConfig(
            hidden_dim=32, queries=2, frequencies=8, feature_dim=32, dropout=0.1, wavelength_range=_waves(spec)
        ),
        planet_config=PlanetParameterConfig(
            n_parameters=len(spec.planet_param_names), hidden_dim=32, feature_dim=32, dropout=0.1
        ),
        use_network_summary=True,
        summary_share=0.75,
        text_share=0.25,
        label_smoothing=0.1,
    )  # fmt: skip


def small(spec: SpecLike) -> MultiModalTrainingConfig:
    """For one small GPU or a patient CPU."""
    return MultiModalTrainingConfig(
        llm_config=LLMConfig(
            hidden_size=544, num_attention_heads=8, num_kv_heads=2, num_layers=8, intermediate_size=1472,
            tie_word_embeddings=True, dropout=0.1, **_text(spec),
        ),
        graph_config=GraphVAEConfig(
            hidden_dim=128, latent_dim=64, num_layers=4, heads=8, global_tokens=4, edge_dim=32, dropout=0.1, beta=0.01,
            **_nodes(spec),
        ),
        cnn_config=DatacubeConfig(
            base_channels=32, max_channels=128, depth=3, feature_dim=128, dropout=0.1, embed_dim=128, num_heads=4,
            num_transformer_layers=4, **_cube(spec, (3, 1, 2, 2, 2)),
        ),
        fusion_config=FusionConfig(
            fusion_dim=128, num_attention_heads=8, num_fusion_layers=2, modality_dropout=0.1, dropout=0.2
        ),
        spectrum_config=SpectrumConfig(hidden_dim=64, feature_dim=64, dropout=0.1, wavelength_range=_waves(spec)),
        planet_config=PlanetParameterConfig(
            n_parameters=len(spec.planet_param_names), hidden_dim=64, feature_dim=64, dropout=0.1
        ),
    )  # fmt: skip


def a5000(spec: SpecLike) -> MultiModalTrainingConfig:
    """Sized for one 24 GB card: 15.4 GB at 18 bytes per parameter (mixed precision, fp32 Adam) plus activations."""
    return _large(spec, heads=32, layers=16, intermediate=5824, graph_width=256, cnn_channels=(64, 256), cnn_depth=4)


def a5000x2(spec: SpecLike) -> MultiModalTrainingConfig:
    """The same for two 24 GB cards with parameters, gradients and optimizer states sharded over both."""
    return _large(spec, heads=40, layers=23, intermediate=7264, graph_width=384, cnn_channels=(64, 384), cnn_depth=4)


def original(spec: SpecLike) -> MultiModalTrainingConfig:
    """The sizes the original system names: 4352 wide, 64 heads, 56 layers; graph 512; cube base 128; fusion 1024."""
    config = _large(
        spec, heads=64, layers=56, intermediate=13_968, graph_width=512, cnn_channels=(128, 512), cnn_depth=6
    )
    return dataclasses.replace(
        config,
        llm_config=dataclasses.replace(config.llm_config, vocab_size=max(32_000, spec.vocab_size)),
        graph_config=dataclasses.replace(config.graph_config, latent_dim=256, heads=16, num_layers=6),
        fusion_config=FusionConfig(fusion_dim=1024, num_attention_heads=8, num_fusion_layers=3),
    )


PRESETS = {"tiny": tiny, "small": small, "a5000": a5000, "a5000x2": a5000x2, "original": original}


def preset(name: str, spec: SpecLike) -> MultiModalTrainingConfig:
    """The preset called `name` for the axes in `spec`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {name!r}")
    return PRESETS[name](spec)


def _large(
    spec: SpecLike,
    heads: int,
    layers: int,
    intermediate: int,
    graph_width: int,
    cnn_channels: tuple[int, int],
    cnn_depth: int,
) -> MultiModalTrainingConfig:
    return MultiModalTrainingConfig(
        llm_config=LLMConfig(
            hidden_size=68 * heads, num_attention_heads=heads, num_kv_heads=heads // 4, num_layers=layers,
            intermediate_size=intermediate, use_gradient_checkpointing=True, **_text(spec),
        ),
        graph_config=GraphVAEConfig(
            hidden_dim=graph_width, latent_dim=graph_width // 2, num_layers=6, heads=8, global_tokens=4, dropout=0.1,
            beta=0.01, use_gradient_checkpointing=True, **_nodes(spec),
        ),
        cnn_config=DatacubeConfig(
            base_channels=cnn_channels[0], max_channels=cnn_channels[1], depth=cnn_depth, feature_dim=512, dropout=0.1,
            embed_dim=256, num_heads=8, num_transformer_layers=6, use_gradient_checkpointing=True,
            **_cube(spec, (3, 1, 2, 2, 2)),
        ),
        fusion_config=FusionConfig(fusion_dim=512, num_attention_heads=8, num_fusion_layers=3),
        spectrum_config=SpectrumConfig(dropout=0.1, wavelength_range=_waves(spec)),
        planet_config=PlanetParameterConfig(n_parameters=len(spec.planet_param_names), dropout=0.1),
    )  # fmt: skip


def _text(spec: SpecLike) -> dict[str, Any]:
    return {"vocab_size": spec.vocab_size, "max_length": spec.max_text_tokens}


def _nodes(spec: SpecLike) -> dict[str, Any]:
    return {
        "node_features": spec.node_features,
        "laplacian_dim": spec.laplacian_dim,
        "random_walk_dim": spec.random_walk_dim,
    }


def _waves(spec: SpecLike) -> tuple[float, float]:
    return float(min(spec.wavelengths)), float(max(spec.wavelengths))


def _cube(spec: SpecLike, patch: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Grid, names, bounds and statistics; patch sizes lowered to a common divisor where an axis is not a multiple."""
    grid = (
        spec.months, spec.n_epochs, len(spec.level_bounds) - 1, len(spec.latitude_bounds) - 1, len(spec.longitudes)
    )  # fmt: skip
    stem_patch = tuple(math.gcd(size, step) for size, step in zip(grid, patch))
    stem_grid = tuple(size // step for size, step in zip(grid, stem_patch))
    tokens = (2, 1, 5, 16 // stem_patch[3], 16 // stem_patch[4])
    return {
        "grid": grid,
        "patch_size": stem_patch,
        "vit_patch_size": tuple(math.gcd(size, step) for size, step in zip(stem_grid, tokens)),
        "input_variables": len(spec.variables),
        "output_variables": len(spec.variables),
        "variables": tuple(spec.variables),
        "level_bounds": tuple(spec.level_bounds),
        "latitude_bounds": tuple(spec.latitude_bounds),
        "cube_mean": tuple(tuple(row) for row in spec.cube_mean),
        "cube_std": tuple(tuple(row) for row in spec.cube_std),
    }
