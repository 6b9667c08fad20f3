"""Patches of a cube and a linear decoder over them whose error and budgets need no decoded cube in memory.

The decoder is linear in its hidden state h: patch = W h. So the squared error is hᵀ(WᵀW)h − 2 hᵀ(Wᵀ patch) +
|patch|², and any weighted sum of the decoded field, such as a water budget, is (wᵀW) h. Both read the input and write
nothing of its size, forward or backward.
"""

import math

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.layers import Linear, RMSNorm
from astrobiogen.layers.children import globally_hooked, is_plain
from astrobiogen.layers.linear import LINEAR
from astrobiogen.models.common import HoldsConstants, affine, at_least_float32, without_autocast
from astrobiogen.models.datacube.config import DatacubeConfig, Ints5
from astrobiogen.models.datacube.physics import LATENT_HEAT, AtmosphereBudgets


def unpatchify(patches: torch.Tensor, patch: Ints5) -> torch.Tensor:
    """Patches [B, *grid, V · Π patch] side by side, [B, V, *grid · patch]."""
    batch, *grid, _ = patches.shape
    blocks = patches.reshape(batch, *grid, -1, *patch)
    order = [0, 6]
    for axis in range(5):
        order += [1 + axis, 7 + axis]
    sizes = [size * step for size, step in zip(grid, patch)]
    return blocks.permute(order).reshape(batch, -1, *sizes)


class PatchDecoder(nn.Module):
    """Deepest map -> hidden state on the stem's grid -> linear patches.

    Args:
        channels: of the deepest map.
        config: sizes.
    """

    def __init__(self, channels: int, config: DatacubeConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.width = config.base_channels
        self.upscale: Ints5 = tuple(  # pyright: ignore[reportAttributeAccessIssue]
            total // step for total, step in zip(config.total_stride, config.patch_size)
        )
        self.norm = RMSNorm(channels)
        self.expand = Linear(channels, config.base_channels * math.prod(self.upscale))
        self.activation = nn.SiLU()
        self.decode = nn.Linear(config.base_channels, config.output_variables * math.prod(config.patch_size))

    def hidden(self, deep: torch.Tensor) -> torch.Tensor:
        """[B, C, *deepest grid] -> [B, *stem grid, base_channels]."""
        # The layer's outputs are ordered (channel, cell); asked for as (cell, channel), runs of channels are copied to
        # their places, where `unpatchify` would move single numbers (5.0 to 2.0 ms with its gradient, tiny preset).
        cells, normed = math.prod(self.upscale), self.norm(deep.movedim(1, -1))
        batch, *grid, _ = normed.shape
        if is_plain(self.expand, LINEAR) and not globally_hooked():
            weight = self.expand.weight.unflatten(0, (-1, cells)).transpose(0, 1).flatten(0, 1)
            bias = self.expand.bias.unflatten(0, (-1, cells)).t().flatten()
            expanded = ops.linear(normed, weight, bias).view(batch, *grid, *self.upscale, -1)
        else:
            expanded = self.expand(normed).unflatten(-1, (-1, *self.upscale)).movedim(6, -1)
        split = self.activation(expanded).permute(0, 1, 6, 2, 7, 3, 8, 4, 9, 5, 10, 11)
        return split.reshape(batch, *(size * step for size, step in zip(grid, self.upscale)), -1)

    def forward(self, deep: torch.Tensor) -> torch.Tensor:
        """The decoded cube [B, V, *grid]."""
        return unpatchify(self.decode(self.hidden(deep)), self.patch)

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """h with a trailing 1, fp32 [B, *stem grid, base_channels + 1]."""
        return at_least_float32(torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], dim=-1))

    def weight(self) -> torch.Tensor:
        """W with the bias as its last column, fp32 [K, base_channels + 1]: decoded patch = W h."""
        weight, bias = affine(self.decode, self.width, self.norm.weight)
        return at_least_float32(torch.cat([weight, bias[:, None]], dim=1))

    def squared_error(self, rows: torch.Tensor, image: torch.Tensor, cube: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the decoded cube, fp32 [B, months, epochs] at the stem's resolution.

        Args:
            rows: of `rows`.
            image: fp32 [B, *stem grid, base_channels + 1], Wᵀ patch of every patch of `cube`.
            cube: [B, V, *grid], to agree with.
        """
        with without_autocast(rows):
            weight = self.weight()
            difference = ((rows @ (weight.t() @ weight) - 2.0 * image) * rows).sum((3, 4, 5, 6))
            exact = torch.promote_types(cube.dtype, torch.float32)
            lines = torch.linalg.vector_norm(cube, dim=-1, dtype=exact)  # no field of squares in memory
            per_time = lines.square().sum((1, 4, 5))
            blocks = per_time.unflatten(2, (-1, self.patch[1])).unflatten(1, (-1, self.patch[0]))
            cells = math.prod(rows.shape[3:6]) * weight.shape[0]
            return (difference + blocks.sum((2, 4))).clamp(min=0.0) / cells


class PatchBudgets(HoldsConstants):
    """Water and energy budgets of decoded patches against the input's, in the units of `AtmosphereBudgets.violations`.

    Negative humidity is judged on the vapour mass of whole patches, so a decoded patch with a negative total is a
    violation.

    Args:
        budgets: the budgets of full fields.
        config: sizes.
    """

    weights: torch.Tensor
    dry_limit: torch.Tensor
    water_scale: torch.Tensor
    energy_scale: torch.Tensor

    def __init__(self, budgets: AtmosphereBudgets, config: DatacubeConfig) -> None:
        super().__init__()
        _, _, levels, rows, columns = config.grid
        pm, pe, pl, pr, pc = config.patch_size
        grid = config.stem_grid
        self.months, self.epochs = pm, pe
        of_fields = budgets.constants()
        field = torch.zeros(2, config.input_variables, levels, rows, columns, device="cpu")
        shape = (levels, rows, columns)
        water = of_fields["water_weight"].view(shape) / of_fields["water_scale"]
        field[0, budgets.humidity] = water
        vapour = LATENT_HEAT * of_fields["water_weight"].view(shape)
        field[1, budgets.humidity] = vapour / of_fields["energy_scale"]
        field[1, budgets.temperature] = of_fields["heat_weight"].view(shape) / of_fields["energy_scale"]
        # the same in every column and time, so one column of patches tells all: [2, V, lev', pl, lat', pr, pc]
        block = field[..., :pc].reshape(2, config.input_variables, grid[2], pl, grid[3], pr, pc)
        block = block.permute(2, 4, 1, 3, 5, 6, 0)  # [lev', lat', V, pl, pr, pc, 2]
        steps = torch.eye(pm * pe, device="cpu").view(pm, pe, pm * pe)
        weights = torch.einsum("zyvcdeq,abm->zyvabcdemq", block, steps)
        self.hold("weights", weights.reshape(grid[2], grid[3], -1, pm * pe, 2))
        limit = water * of_fields["dry_limit"][:, None, None]
        self.hold("dry_limit", limit[..., :pc].reshape(grid[2], pl, grid[3], pr, pc).sum((1, 3, 4)))
        self.hold("water_scale", of_fields["water_scale"].clone())
        self.hold("energy_scale", of_fields["energy_scale"].clone())

    def forward(
        self, decoder: PatchDecoder, rows: torch.Tensor, water: torch.Tensor, energy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(water, energy, negative humidity), relative differences [B, months, epochs] in fp32.

        Args:
            decoder: the linear decoder.
            rows: of `PatchDecoder.rows`.
            water: [B, months, epochs] to agree with, of `AtmosphereBudgets.anomaly`.
            energy: the same.
        """
        with without_autocast(rows):
            through = torch.einsum("zykmq,kc->zycmq", self.weights, decoder.weight())
            decoded = torch.einsum("btgzyxc,zycmq->btgzyxmq", rows, through)
            sums = decoded.sum((3, 4, 5))
            missing = (decoded[..., 0] + self.dry_limit[:, :, None, None]).clamp(max=0.0).sum((3, 4, 5))
            given = (water / self.water_scale, energy / self.energy_scale)
        return (
            self._months(sums[..., 0]) - given[0],
            self._months(sums[..., 1]) - given[1],
            self._months(missing),
        )

    def _months(self, values: torch.Tensor) -> torch.Tensor:
        """[B, t, g, pm · pe] -> [B, months, epochs]."""
        batch, blocks, groups, _ = values.shape
        split = values.view(batch, blocks, groups, self.months, self.epochs).permute(0, 1, 3, 2, 4)
        return split.reshape(batch, blocks * self.months, groups * self.epochs)
