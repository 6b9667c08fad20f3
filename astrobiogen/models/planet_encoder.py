"""Encoder of planet and star parameters, any of which may be missing."""

import dataclasses
from typing import Any

import torch
from torch import nn

from astrobiogen.layers import RMSNorm
from astrobiogen.models.common import check_axes, require, resolve_config


@dataclasses.dataclass(frozen=True)
class PlanetParameterConfig:
    """Sizes of `PlanetParameterEncoder`.

    Attributes:
        n_parameters: P.
        hidden_dim: width inside.
        feature_dim: size of the result.
        dropout: in training only.
    """

    n_parameters: int = 10
    hidden_dim: int = 128
    feature_dim: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_parameters", "hidden_dim", "feature_dim"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")


class PlanetParameterEncoder(nn.Module):
    """Standardised parameters [B, P] and which of them are known -> [B, feature_dim].

    The mask is an input of its own, so a missing parameter (0) differs from one at the training mean (0 too).

    Args:
        config: a `PlanetParameterConfig`; default `PlanetParameterConfig()`.
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of `PlanetParameterConfig`.
        ValueError: sizes do not fit together.
    """

    def __init__(self, config: PlanetParameterConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(PlanetParameterConfig, config, overrides)
        self.config = config
        self.layers = nn.Sequential(
            nn.Linear(2 * config.n_parameters, config.hidden_dim),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_dim, config.feature_dim),
        )
        self.norm = RMSNorm(config.feature_dim)

    @property
    def feature_dim(self) -> int:
        """Width of the result."""
        return self.config.feature_dim

    def forward(self, parameters: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encode `parameters` [B, P]; `mask` bool [B, P] is True where a value is known, default everywhere."""
        sizes = {"parameter": self.config.n_parameters}
        check_axes("planet_params", parameters, ("batch", "parameter"), sizes)
        known = torch.ones_like(parameters) if mask is None else mask.to(parameters.dtype)
        check_axes("planet_params_mask", known, ("batch", "parameter"), sizes | {"batch": parameters.shape[0]})
        return self.norm(self.layers(torch.cat([parameters * known, known], dim=-1)))
