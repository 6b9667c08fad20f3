"""Configuration of the datacube network and the grid arithmetic behind it."""

import dataclasses
import math
from typing import Literal

from astrobiogen.models.common import require
from astrobiogen.models.original.names import CUBE_NAMES, takes_original_names

AXES = ("climate_time", "geological_time", "lev", "lat", "lon")
Ints5 = tuple[int, int, int, int, int]
Table = tuple[tuple[float, ...], ...]


@takes_original_names(CUBE_NAMES)
@dataclasses.dataclass(frozen=True)
class DatacubeConfig:
    """Sizes and switches of `RebuiltDatacubeCNN`. Axis order everywhere: climate_time, geological_time, lev, lat, lon.

    Attributes:
        input_variables: V of the input.
        output_variables: V of the prediction; must equal `input_variables` for the reconstruction loss.
        grid: sizes of the five axes.
        base_channels: channels of the first stage.
        max_channels: cap on the doubling per down-sampling.
        depth: stages of one residual block each.
        convolution: "factorised" (1x1x1x3x3, then 1x1x3x1x1, then 3x3x1x1x1) or "dense" (3x3x3x3x3, 243 taps).
        latitude_padding: "zeros" or "pole".
        patch_size: size and stride of the stem's patches.
        feature_dim: size of ``features``.
        dropout: in training only.
        use_vit_features: add the transformer over patch tokens.
        embed_dim, num_heads, num_transformer_layers: its size.
        vit_patch_size: its patches, in cells of the stem's output.
        statistics_thresholds: thresholds of `ClimateStatistics`, whose reading is added to the features; 0: none.
        statistics_variables: names of the variables it takes.
        statistics_levels: how many of the lowest levels it takes.
        use_physics_constraints: budgets of the prediction against the input.
        use_gradient_checkpointing: recompute each block in the backward pass.
        variables: names along the variable axis.
        level_bounds: σ interfaces [lev + 1]; empty: evenly spaced.
        latitude_bounds: degrees [lat + 1]; empty: evenly spaced from 90 to −90.
        cube_mean, cube_std: [V][lev] of the standardisation; empty: 0 and 1.
    """

    input_variables: int = 2
    output_variables: int = 2
    grid: Ints5 = (12, 3, 10, 32, 64)
    base_channels: int = 128
    max_channels: int = 512
    depth: int = 6
    convolution: Literal["factorised", "dense"] = "factorised"
    latitude_padding: Literal["zeros", "pole"] = "zeros"
    patch_size: Ints5 = (3, 1, 2, 4, 4)
    feature_dim: int = 512
    dropout: float = 0.0
    use_vit_features: bool = True
    embed_dim: int = 256
    num_heads: int = 8
    num_transformer_layers: int = 6
    vit_patch_size: Ints5 = (2, 1, 5, 2, 4)
    statistics_thresholds: int = 0
    statistics_variables: tuple[str, ...] = ("ta",)
    statistics_levels: int = 1
    use_physics_constraints: bool = True
    use_gradient_checkpointing: bool = False
    variables: tuple[str, ...] = ("ta", "hus")
    level_bounds: tuple[float, ...] = ()
    latitude_bounds: tuple[float, ...] = ()
    cube_mean: Table = ()
    cube_std: Table = ()

    def __post_init__(self) -> None:
        for name in ("input_variables", "base_channels", "depth", "feature_dim"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.output_variables == self.input_variables,
            f"output_variables must equal input_variables = {self.input_variables}, got {self.output_variables}",
        )
        require(
            len(self.variables) == self.input_variables or not self.use_physics_constraints,
            f"variables must name all {self.input_variables} input_variables, got {self.variables}",
        )
        for axis, size, step in zip(AXES, self.grid, self.patch_size):
            require(size % step == 0, f"patch_size on axis {axis!r}: {step} does not divide the grid's {size}")
        for name, length in (("level_bounds", self.grid[2] + 1), ("latitude_bounds", self.grid[3] + 1)):
            given = len(getattr(self, name))
            require(given in (0, length), f"{name} must have {length} values or none, got {given}")
        require(
            self.convolution in ("factorised", "dense"),
            f"convolution must be 'factorised' or 'dense', got {self.convolution!r}",
        )
        require(
            self.latitude_padding in ("zeros", "pole"),
            f"latitude_padding must be 'zeros' or 'pole', got {self.latitude_padding!r}",
        )
        require(
            self.latitude_padding != "pole" or self.stem_grid[4] % 2 == 0,
            f"latitude_padding 'pole' needs an even number of longitudes behind the stem, got {self.stem_grid[4]}",
        )
        if self.statistics_thresholds:
            unknown = sorted(set(self.statistics_variables) - set(self.variables))
            require(not unknown, f"statistics_variables: unknown {unknown}, expected some of {self.variables}")
            require(
                1 <= self.statistics_levels <= self.grid[2],
                f"statistics_levels must be 1 to {self.grid[2]}, got {self.statistics_levels}",
            )
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def stem_grid(self) -> Ints5:
        """Sizes of the five axes behind the stem."""
        return tuple(size // step for size, step in zip(self.grid, self.patch_size))  # pyright: ignore[reportReturnType]

    @property
    def stage_strides(self) -> tuple[Ints5, ...]:
        """Stride in front of each stage: 2 on an axis that is even and at least 4 long, else 1; longitude stays even
        under "pole" padding, which continues a meridian on the opposite one."""
        strides: list[Ints5] = [(1, 1, 1, 1, 1)]
        grid = list(self.stem_grid)
        factors = (2, 0, 2, 2, 4 if self.latitude_padding == "pole" else 2)
        for _ in range(self.depth - 1):
            step = [2 if by and size % by == 0 and size >= 4 else 1 for by, size in zip(factors, grid)]
            grid = [size // by for size, by in zip(grid, step)]
            strides.append(tuple(step))  # pyright: ignore[reportArgumentType]
        return tuple(strides)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of each stage: doubled where the grid shrinks, at most `max_channels`."""
        channels = [self.base_channels]
        for stride in self.stage_strides[1:]:
            channels.append(min(channels[-1] * 2, self.max_channels) if math.prod(stride) > 1 else channels[-1])
        return tuple(channels)

    @property
    def total_stride(self) -> Ints5:
        """Input cells per cell of the deepest feature map, per axis."""
        total = list(self.patch_size)
        for stride in self.stage_strides:
            total = [have * by for have, by in zip(total, stride)]
        return tuple(total)  # pyright: ignore[reportReturnType]

    @property
    def deepest_grid(self) -> Ints5:
        """Sizes of the five axes of the deepest feature map."""
        return tuple(size // step for size, step in zip(self.grid, self.total_stride))  # pyright: ignore[reportReturnType]

    @property
    def sigma_interfaces(self) -> tuple[float, ...]:
        """`level_bounds`, or evenly spaced ones."""
        levels = self.grid[2]
        return self.level_bounds or tuple(level / levels for level in range(levels + 1))

    @property
    def latitude_edges(self) -> tuple[float, ...]:
        """`latitude_bounds`, or evenly spaced ones."""
        rows = self.grid[3]
        return self.latitude_bounds or tuple(90.0 - 180.0 * row / rows for row in range(rows + 1))

    def standardisation(self) -> tuple[Table, Table]:
        """(mean, std) tables [V][lev]."""
        levels = self.grid[2]
        mean = self.cube_mean or ((0.0,) * levels,) * self.input_variables
        std = self.cube_std or ((1.0,) * levels,) * self.input_variables
        return mean, std
