"""Encoder of a spectrum on any wavelength grid."""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from astrobiogen.layers import Linear, RMSNorm, SwiGLU
from astrobiogen.models.common import at_least_float32, check_axes, require, resolve_config


@dataclasses.dataclass(frozen=True)
class SpectrumConfig:
    """Sizes of `SpectrumEncoder`.

    Attributes:
        channels: columns of the input; the first is the wavelength in micrometres, the others are values.
        wavelength_range: shortest and longest wavelength in micrometres that the encoding resolves.
        frequencies: pairs of sine and cosine over log wavelength.
        hidden_dim: width per spectral point.
        queries: learned attention poolings.
        feature_dim: size of the result.
        dropout: in training only.
    """

    channels: int = 2
    wavelength_range: tuple[float, float] = (0.1, 30.0)
    frequencies: int = 16
    hidden_dim: int = 128
    queries: int = 8
    feature_dim: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.channels >= 2, f"channels must be at least 2 (wavelength and a value), got {self.channels}")
        low, high = self.wavelength_range
        require(0 < low < high, f"wavelength_range must be positive and increasing, got {self.wavelength_range}")
        for name in ("frequencies", "hidden_dim", "queries", "feature_dim"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")


class SpectrumEncoder(nn.Module):
    """[B, W, channels] with mask -> [B, feature_dim]; the wavelength grid may differ between samples.

    A point is its values, its values times sines and cosines of log wavelength (so that a band's place and depth are
    seen together), and the sines and cosines themselves; a gated block per point; then `queries` masked attention
    poolings over the points.

    Args:
        config: a `SpectrumConfig`; default `SpectrumConfig()`.
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of `SpectrumConfig`.
        ValueError: sizes do not fit together.
    """

    def __init__(self, config: SpectrumConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(SpectrumConfig, config, overrides)
        self.config = config
        values, waves = config.channels - 1, 2 * config.frequencies
        self.embed = Linear(values + waves + values * waves, config.hidden_dim)
        self.norm = RMSNorm(config.hidden_dim)
        self.mlp = SwiGLU(config.hidden_dim, 2 * config.hidden_dim)
        self.score = Linear(config.hidden_dim, config.queries, bias=False)  # a softmax ignores a bias
        self.to_features = nn.Linear(config.queries * config.hidden_dim, config.feature_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.feature_norm = RMSNorm(config.feature_dim)

    @property
    def feature_dim(self) -> int:
        """Width of the result."""
        return self.config.feature_dim

    def forward(self, spectrum: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encode.

        Args:
            spectrum: [B, W, channels]; column 0 is the wavelength in micrometres, values are standardised.
            mask: bool [B, W], True at real points; default all. A sample without any gives a constant vector.
        """
        check_axes("spectroscopy", spectrum, ("batch", "wavelength", "channel"), {"channel": self.config.channels})
        if mask is None:
            mask = torch.ones(spectrum.shape[:2], dtype=torch.bool, device=spectrum.device)
        check_axes(
            "spectroscopy_mask", mask, ("batch", "wavelength"), dict(zip(("batch", "wavelength"), spectrum.shape))
        )
        spectrum = spectrum.masked_fill(~mask[..., None], 0.0)
        values, waves = spectrum[..., 1:], self._waves(spectrum[..., 0])
        products = (values[..., :, None] * waves[..., None, :]).flatten(2)
        points = self.embed(torch.cat([values, waves, products], dim=-1))
        points = points + self.mlp(self.norm(points))
        scores = at_least_float32(self.score(points)).masked_fill(~mask[..., None], torch.finfo(torch.float32).min)
        weights = scores.softmax(1).masked_fill(~mask[..., None], 0.0).to(points.dtype)
        pooled = torch.einsum("bwq,bwc->bqc", weights, points).flatten(1)
        return self.feature_norm(self.to_features(self.dropout(pooled)))

    def _waves(self, wavelength: torch.Tensor) -> torch.Tensor:
        """sin and cos of k·π·position, k = 1 … frequencies, position 0 to 1 in log wavelength over the range."""
        low, high = self.config.wavelength_range
        position = (at_least_float32(wavelength).clamp(min=low, max=high) / low).log() / math.log(high / low)
        orders = torch.arange(1, self.config.frequencies + 1, device=wavelength.device, dtype=position.dtype)
        angles = math.pi * position[..., None] * orders
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(wavelength.dtype)
