"""CUDA launchers of the norms behind a convolution: passes over channel-last rows [B, *spatial, C], and the op
`conv_nd_norm_backward`."""

import math
from typing import Any

import torch

from astrobiogen.kernels.conv_nd import reference
from astrobiogen.kernels.conv_nd.geometry import GROUP, Norm
from astrobiogen.kernels.conv_nd.triton.launch import Problem
from astrobiogen.kernels.conv_nd.triton.norm import (
    group_rows_backward,
    group_sums,
    merge_tiles,
    norm_rows,
    norm_rows_backward,
    scale_rows,
)
from astrobiogen.kernels.triton_launch import launch

# Elements of one tile: with 4 warps 32 values per thread and tensor, three or four tensors live at once.
TILE_ELEMENTS = 4096
# Channels of a tile of the group kernels, which need not hold all of them.
GROUP_CHANNELS = 128
# Programs that sum a gradient over positions: three waves of one block on the largest device (132 multiprocessors).
SUM_PROGRAMS = 396
# Partial statistics that one step of `merge_tiles` reads: 8 per thread of 4 warps.
MERGE_BLOCK = 1024
# Elements of a row per warp: a kernel that holds whole rows of many channels gets more warps instead of spilling.
ROW_PER_WARP = 1024


def affine(
    channels: int, weight: torch.Tensor | None, bias: torch.Tensor | None, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's weight and bias, ones and zeros where it has none."""
    return (
        like.new_ones(channels) if weight is None else weight.contiguous(),
        like.new_zeros(channels) if bias is None else bias.contiguous(),
    )


def normalize_rows(
    z: torch.Tensor,
    y: torch.Tensor,
    norm: Norm,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: int,
    keep: bool,
) -> None:
    """y = act(norm(z) * gamma + beta) for a channel norm; `y` may be `z`; statistics if `keep`."""
    rows, channels = z.numel() // z.shape[-1], z.shape[-1]
    block_c, block_r = row_blocks(channels)
    launch(norm_rows, (-(-rows // block_r),))(
        z, y, gamma, beta, mean, rstd, rows, norm.eps,
        C=channels, NORM=norm.kind, ACTIVATION=activation, KEEP=keep, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=row_warps(block_c),
    )  # fmt: skip


def group_statistics(
    norm: Norm, problem: Problem, tile: int, partial: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> None:
    """Fills mean and rstd [B, groups] from `partial` [2, tiles, C]: mean and sum of squared deviations per position
    tile of `tile` rows and channel, as the convolution's epilogue left them. Exact merge, fixed order."""
    batch, channels = mean.shape[0], partial.shape[-1]
    tiles = partial.shape[1] // batch
    splits = max(1, min(SUM_PROGRAMS // (batch * norm.groups), tiles))
    merged = torch.empty(batch, norm.groups, splits, 3, dtype=torch.float32, device=mean.device)
    launch(merge_tiles, (batch * norm.groups * splits,))(
        partial[0], partial[1], merged, tiles, splits, problem.plane, -(-problem.plane // tile),
        C=channels, GROUPS=norm.groups, TILE_ROWS=tile, BLOCK=MERGE_BLOCK,
    )  # fmt: skip
    count, center, spread = merged.double().unbind(-1)
    total = count.sum(-1)
    overall = (count * center).sum(-1) / total
    mean.copy_(overall)
    spread = (spread + count * (center - overall[..., None]).square()).sum(-1)
    rstd.copy_(torch.rsqrt(spread / total + norm.eps))


def scale_group(
    z: torch.Tensor,
    y: torch.Tensor,
    norm: Norm,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    activation: int,
) -> None:
    """y = act((z - mean) rstd gamma + beta) for a group norm; `y` may be `z`."""
    channels = z.shape[-1]
    center, inverse = _spread(norm, channels, mean, rstd)
    scale = inverse * gamma.float()
    positions, grid, blocks = _group_grid(z)
    launch(scale_rows, (math.prod(grid),))(
        z, y, center, scale, beta.float(), positions, C=channels, ACTIVATION=activation, **blocks
    )


def conv_nd_norm_backward(
    grad: torch.Tensor,
    kept: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `conv_nd_norm_backward` on CUDA; `options`: mean, rstd, norm, groups, activation. fp64 runs the
    reference."""
    if kept.dtype == torch.float64:
        return reference.conv_nd_norm_backward_op(grad, kept, norm_weight, norm_bias, *options)
    mean, rstd, kind, groups, activation = options
    z, dy = kept.movedim(1, -1).contiguous(), grad.movedim(1, -1).contiguous()
    result, channels = torch.empty_like(z), z.shape[-1]
    gamma, beta = affine(channels, norm_weight, norm_bias, z)
    if z.numel() == 0:
        sums = torch.zeros(2, channels, dtype=torch.float32, device=z.device)
    elif kind == GROUP:
        sums = _group_backward(dy, z, result, Norm(kind, groups, 0.0), mean, rstd, gamma, beta, activation)
    else:
        rows = z.numel() // channels
        block_c, block_r = row_blocks(channels)
        programs = min(SUM_PROGRAMS, -(-rows // block_r))
        partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=z.device)
        launch(norm_rows_backward, (programs,))(
            dy, z, result, gamma, beta, mean, rstd, partial, rows,
            C=channels, NORM=kind, ACTIVATION=activation, BLOCK_R=block_r, BLOCK_C=block_c,
            num_warps=row_warps(block_c),
        )  # fmt: skip
        sums = partial.sum(0)
    return result.movedim(-1, 1), sums[1].to(z.dtype), sums[0].to(z.dtype)


def _group_backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    result: torch.Tensor,
    norm: Norm,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    activation: int,
) -> torch.Tensor:
    """Fills `result`; the sums of d and d h per channel, [2, C]."""
    channels = z.shape[-1]
    center, inverse = _spread(norm, channels, mean, rstd)
    positions, grid, blocks = _group_grid(z)
    tiles, others = grid[0], grid[1] * grid[2]
    splits = min(tiles, max(1, SUM_PROGRAMS // others))
    partial = torch.empty(z.shape[0], splits, 2, channels, dtype=torch.float32, device=z.device)
    shared = {"C": channels, "ACTIVATION": activation, **blocks}
    launch(group_sums, (splits * others,))(grad, z, gamma, beta, center, inverse, partial, positions, splits, **shared)
    sums = partial.sum(1)  # [B, 2, C]
    weighted = (sums * gamma.float()).view(z.shape[0], 2, norm.groups, -1)
    means = weighted.sum(-1) / (positions * weighted.shape[-1])
    grad_mean, grad_projection = _spread(norm, channels, means[:, 0], means[:, 1])
    launch(group_rows_backward, (tiles * others,))(
        grad, z, result, gamma, beta, center, inverse, grad_mean, grad_projection, positions, **shared
    )
    return sums.sum(0)


def _spread(norm: Norm, channels: int, *statistics: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per-group values [B, groups] repeated for each channel, [B, C]."""
    return tuple(s.repeat_interleave(channels // norm.groups, 1).contiguous() for s in statistics)


def row_blocks(channels: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_R) of the kernels that hold all channels of a row."""
    block_c = max(16, 1 << (channels - 1).bit_length())
    return block_c, max(1, TILE_ELEMENTS // block_c)


def row_warps(block_c: int) -> int:
    return min(16, max(4, block_c // ROW_PER_WARP))


def _group_grid(z: torch.Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Positions per sample; tiles of rows, samples and tiles of channels; block sizes of the group kernels."""
    channels = z.shape[-1]
    block_c = min(GROUP_CHANNELS, max(16, 1 << (channels - 1).bit_length()))
    block_r = TILE_ELEMENTS // block_c
    positions = z.numel() // (z.shape[0] * channels)
    grid = (-(-positions // block_r), z.shape[0], -(-channels // block_c))
    return positions, grid, {"BLOCK_R": block_r, "BLOCK_C": block_c}
