"""Five-dimensional convolutional network for climate datacubes."""

import math
from typing import Any

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.layers import ConvNd, RMSNorm
from astrobiogen.models.common import (
    HoldsConstants,
    affine,
    at_least_float32,
    check_axes,
    maybe_checkpoint,
    require,
    resolve_config,
    without_autocast,
)
from astrobiogen.models.datacube.config import AXES, DatacubeConfig, Ints5
from astrobiogen.models.datacube.head import PatchBudgets, PatchDecoder
from astrobiogen.models.datacube.physics import AtmosphereBudgets, area_weights, over_epochs
from astrobiogen.models.datacube.statistics import ClimateStatistics
from astrobiogen.models.datacube.vision_transformer import GridTransformer

CUBE_AXES = ("batch", "variable", *AXES)


def cube_from_legacy(cube: torch.Tensor) -> torch.Tensor:
    """The original system's [B, V, time, lat, lon, lev] as [B, V, climate_time, geological_time = 1, lev, lat, lon];
    a view.

    Raises:
        ValueError: `cube` does not have six axes.
    """
    check_axes("cube", cube, ("batch", "variable", "time", "lat", "lon", "lev"))
    return cube.permute(0, 1, 2, 5, 3, 4).unsqueeze(3)


class RebuiltDatacubeCNN(HoldsConstants):
    """Climate cube [B, V, climate_time, geological_time, lev, lat, lon] -> features [B, C], prediction on the input
    grid, budgets.

    A strided patch stem, `depth` residual blocks of true five-dimensional convolutions with down-sampling between
    them, per-axis padding (climate_time and longitude are circles), and, in parallel on the stem's output, a
    transformer over patch tokens of all five axes. Features keep the vertical: per level the area-weighted mean over
    the globe and the months, for the last epoch and for the mean of all existing epochs. With `statistics_thresholds`
    the area-weighted distribution of the near-surface climate (`ClimateStatistics`) is read beside these patterns and
    added. The prediction is read from the deepest map only, a real bottleneck.

    Args:
        config: a `DatacubeConfig`; default `DatacubeConfig()`.
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of `DatacubeConfig`.
        ValueError: sizes do not fit together.
    """

    pool_weights: torch.Tensor

    def __init__(self, config: DatacubeConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(DatacubeConfig, config, overrides)
        self.config = config
        self.stem = nn.Linear(config.input_variables * math.prod(config.patch_size), config.base_channels)
        self.epoch_presence = nn.Parameter(torch.zeros(config.base_channels))
        self.stages = nn.ModuleList()
        previous = config.base_channels
        for channels, stride in zip(config.stage_channels, config.stage_strides):
            self.stages.append(Stage(previous, channels, stride, config))
            previous = channels
        width = 2 * previous * config.deepest_grid[2]
        if config.use_vit_features:
            self.vit = GridTransformer(
                config.base_channels, config.stem_grid, AXES, config.vit_patch_size, config.embed_dim, config.num_heads,
                config.num_transformer_layers, config.dropout, config.use_gradient_checkpointing,
            )  # fmt: skip
            width += config.embed_dim
        self.to_features = nn.Linear(width, config.feature_dim)
        if config.statistics_thresholds:
            self.statistics = ClimateStatistics(
                config.latitude_edges, [config.variables.index(name) for name in config.statistics_variables],
                config.statistics_levels, config.statistics_thresholds,
            )  # fmt: skip
            size = len(config.statistics_variables) * config.statistics_levels * config.statistics_thresholds
            self.read_statistics = nn.Sequential(
                nn.Linear(size, config.feature_dim), nn.SiLU(), nn.Dropout(config.dropout),
                nn.Linear(config.feature_dim, config.feature_dim),
            )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)
        self.feature_norm = RMSNorm(config.feature_dim)
        self.decoder = PatchDecoder(previous, config)
        rows = area_weights(config.latitude_edges).view(config.deepest_grid[3], -1).sum(1)
        self.hold("pool_weights", rows)
        if config.use_physics_constraints:
            mean, std = config.standardisation()
            self.budgets = AtmosphereBudgets(
                config.variables, config.sigma_interfaces, config.latitude_edges, config.grid[4], mean, std
            )
            self.patch_budgets = PatchBudgets(self.budgets, config)

    @property
    def feature_dim(self) -> int:
        """Width of ``features``."""
        return self.config.feature_dim

    def forward(
        self, cube: torch.Tensor, epoch_mask: torch.Tensor | None = None, return_prediction: bool = False
    ) -> dict[str, Any]:
        """Encode a standardised cube and decode it again from the bottleneck.

        Args:
            cube: [B, V, climate_time, geological_time, lev, lat, lon]; absent epochs are zero.
            epoch_mask: bool [B, geological_time], epochs that exist; default all.
            return_prediction: also return the decoded cube; no loss needs it in memory.

        Returns:
            ``features`` [B, feature_dim], ``statistics_features`` [B, feature_dim] (the same from the statistics alone;
            only with statistics), ``reconstruction_loss`` [B] (mean squared error over existing epochs, in
            standard deviations), ``physics_violations`` (name -> [B]; empty when off), ``physics_loss`` [B] their
            sum, on request ``prediction`` (the cube's shape, standardised).
        """
        config = self.config
        sizes = {"variable": config.input_variables, **dict(zip(AXES, config.grid))}
        check_axes("climate_datacube", cube, CUBE_AXES, sizes)
        batch, epochs = cube.shape[0], config.grid[1]
        if epoch_mask is None:
            epoch_mask = torch.ones(batch, epochs, dtype=torch.bool, device=cube.device)
        check_axes(
            "climate_mask", epoch_mask, ("batch", "geological_time"), {"batch": batch, "geological_time": epochs}
        )
        stem, image = self._embed(cube, epoch_mask)
        deep = stem
        for stage in self.stages:
            deep = maybe_checkpoint(config.use_gradient_checkpointing, stage, deep)
        pooled = self._pool(deep, epoch_mask)
        if config.use_vit_features:
            pooled = torch.cat([pooled, self.vit(stem)], dim=-1)
        outputs = self._features(self.to_features(self.dropout(pooled)), cube, epoch_mask)
        outputs |= self._score(self.decoder.hidden(deep), image, cube, epoch_mask)
        if return_prediction:
            outputs["prediction"] = self.decoder(deep)
        return outputs

    def _embed(self, cube: torch.Tensor, epoch_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(stem [B, C, *stem grid], Wᵀ patch [B, *stem grid, C + 1] for the decoder's error).

        Both are linear in the patches and come from one strided convolution, which reads the cube once, in fp32. The
        stem adds a learned vector where the epoch exists.
        """
        patch, channels = self.config.patch_size, self.config.base_channels
        with without_autocast(cube):
            stem_weight, stem_bias = affine(
                self.stem, math.prod(patch) * self.config.input_variables, self.epoch_presence
            )
            weight = torch.cat([at_least_float32(stem_weight), self.decoder.weight().t()])
            kernels = weight.view(-1, self.config.input_variables, *patch)
            both = ops.conv_nd(at_least_float32(cube), kernels, None, stride=patch).movedim(1, -1)
        stem, image = both.split([channels, channels + 1], dim=-1)
        present = _pool_mask(epoch_mask, patch[1]).to(self.epoch_presence.dtype)
        marks = present[:, None, :, None, None, None, None] * self.epoch_presence + stem_bias
        return (stem.to(marks.dtype) + marks).movedim(-1, 1), image

    def _features(self, patterns: torch.Tensor, cube: torch.Tensor, epoch_mask: torch.Tensor) -> dict[str, Any]:
        """Features from the patterns [B, feature_dim] and, where there are any, the statistics."""
        if not self.config.statistics_thresholds:
            return {"features": self.feature_norm(patterns)}
        shares = self.statistics(cube, epoch_mask).flatten(1)
        found = self.read_statistics(shares.to(patterns.dtype))
        return {"features": self.feature_norm(patterns + found), "statistics_features": self.feature_norm(found)}

    def _pool(self, deep: torch.Tensor, epoch_mask: torch.Tensor) -> torch.Tensor:
        """[B, C, months, epochs, lev, lat, lon] -> [B, 2 · C · lev]: the last epoch and the mean of existing epochs."""
        rows = torch.einsum("bctgzyx,y->bcgz", deep, self.pool_weights.to(deep.dtype))
        per_epoch = rows / (deep.shape[2] * deep.shape[6])
        weights = _pool_mask(epoch_mask, self.config.patch_size[1]).to(deep.dtype)
        mean = torch.einsum("bcgz,bg->bcz", per_epoch, weights / weights.sum(1, keepdim=True).clamp(min=1.0))
        return torch.cat([per_epoch[:, :, -1].flatten(1), mean.flatten(1)], dim=-1)

    def _score(
        self, hidden: torch.Tensor, image: torch.Tensor, cube: torch.Tensor, epoch_mask: torch.Tensor
    ) -> dict[str, Any]:
        """Reconstruction error and physics violations per sample."""
        rows = self.decoder.rows(hidden)
        error = self.decoder.squared_error(rows, image, cube)
        blocks = _pool_mask(epoch_mask, self.config.patch_size[1])
        violations: dict[str, torch.Tensor] = {}
        if self.config.use_physics_constraints:
            water, energy, missing = self.patch_budgets(self.decoder, rows, *self.budgets.anomaly(cube.detach()))
            violations = {
                "water": over_epochs(water.square(), epoch_mask),
                "energy": over_epochs(energy.square(), epoch_mask),
                "negative_humidity": over_epochs(missing.square(), epoch_mask),
            }
        reconstruction = over_epochs(error, blocks)
        total = sum(violations.values(), torch.zeros_like(reconstruction))
        return {"reconstruction_loss": reconstruction, "physics_violations": violations, "physics_loss": total}


class Stage(nn.Module):
    """Optional strided convolution, then one residual block of five-dimensional convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: Ints5, config: DatacubeConfig) -> None:
        super().__init__()
        self.down: ConvNd | None = None
        if max(stride) > 1 or in_channels != channels:
            self.down = ConvNd(5, in_channels, channels, stride, stride=stride, memory_format="channels_last")
        self.norm = RMSNorm(channels)
        modes = ("circular", "zeros", "zeros", config.latitude_padding, "circular")
        kernels = [(1, 1, 1, 3, 3), (1, 1, 3, 1, 1), (3, 3, 1, 1, 1)]
        if config.convolution == "dense":
            kernels = [(3, 3, 3, 3, 3), (1, 1, 1, 1, 1)]
        self.convolutions = nn.ModuleList(
            ConvNd(
                5,
                channels,
                channels,
                kernel,
                padding=tuple(size // 2 for size in kernel),
                padding_mode=modes,
                activation=None if kernel is kernels[-1] else "silu",
                memory_format="channels_last",
            )
            for kernel in kernels
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, *grid] to [B, channels, *grid / stride]."""
        if self.down is not None:
            x = self.down(x)
        branch = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        for convolution in self.convolutions:
            branch = convolution(branch)
        return x + branch


def _pool_mask(epoch_mask: torch.Tensor, step: int) -> torch.Tensor:
    """Mask [B, G] at the stem's resolution [B, G / step]: an epoch patch exists if any of its epochs does."""
    require(epoch_mask.shape[1] % step == 0, f"climate_mask: axis 'geological_time' must be a multiple of {step}")
    return epoch_mask.view(epoch_mask.shape[0], -1, step).any(-1)
