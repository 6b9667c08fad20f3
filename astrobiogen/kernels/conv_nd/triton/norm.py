"""Triton kernels of the norms behind a convolution, over channel-last rows [positions, C].

Channel norms that the convolution's own epilogue cannot finish (a tile does not hold all channels), the second half of
a group norm, and both backwards. Memory-bound: every tensor is read and written once (a group norm's backward reads
twice). Grids are flat: axes 1 and 2 of a CUDA grid end at 65,535, and a batch may be longer.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.conv_nd.triton.device import activate, activation_slope, channel_statistics


@triton.jit(do_not_specialize=["ROWS"])
def norm_rows(
    z, y, gamma, beta, mean, rstd, ROWS, eps,
    C: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(norm(z) * gamma + beta) for a channel norm; mean and rstd per row if KEEP."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    row_ok, ok = row < ROWS, channel < C
    offset = row[:, None] * C + channel[None, :]
    mask = row_ok[:, None] & ok[None, :]
    value = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
    hat, center, inverse = channel_statistics(value, ok, C, eps, NORM)
    if KEEP:
        if NORM == 2:
            tl.store(mean + row, center, mask=row_ok)
        tl.store(rstd + row, inverse, mask=row_ok)
    u = hat * tl.load(gamma + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    u += tl.load(beta + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, activate(u, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit
def group_tile(POSITIONS, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row tile, sample, channels) of this program of a grid [samples, tiles of channels, tiles of rows]."""
    row_tiles = (POSITIONS + BLOCK_R - 1) // BLOCK_R
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    rest = tl.program_id(0) // row_tiles
    channel = rest % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) % row_tiles, (rest // channel_tiles).to(tl.int64), channel


@triton.jit(do_not_specialize=["POSITIONS"])
def scale_rows(
    z, y, center, scale, shift, POSITIONS,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((z - center[sample]) * scale[sample] + shift): the second half of a group norm. center, scale [B, C] and
    shift [C], fp32. The mean goes first: z * scale - mean * scale would cancel where the mean is large."""
    tile, sample, channel = group_tile(POSITIONS, C, BLOCK_R, BLOCK_C)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = channel < C
    mask = (row < POSITIONS)[:, None] & ok[None, :]
    offset = (sample * POSITIONS + row)[:, None] * C + channel[None, :]
    value = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
    value -= tl.load(center + sample * C + channel, mask=ok, other=0.0)[None, :]
    u = value * tl.load(scale + sample * C + channel, mask=ok, other=0.0)[None, :]
    u += tl.load(shift + channel, mask=ok, other=0.0)[None, :]
    tl.store(y + offset, activate(u, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["TILES", "SPLITS", "PLANE", "PLANE_TILES"])
def merge_tiles(
    center, squares, merged, TILES, SPLITS, PLANE, PLANE_TILES,
    C: tl.constexpr, GROUPS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """merged [B, GROUPS, SPLITS, 3] fp32: elements, mean and sum of squared deviations of one group over a share of a
    sample's TILES position tiles, from center and squares [B * TILES, C] per tile and channel.

    Blocks are merged in order by Chan's formula: nothing is subtracted that was large, every run gives the same bits.
    The last of the PLANE_TILES tiles of a plane of PLANE positions may hold fewer than TILE_ROWS.
    """
    width: tl.constexpr = C // GROUPS
    split = tl.program_id(0) % SPLITS
    group = tl.program_id(0) // SPLITS % GROUPS
    sample = (tl.program_id(0) // (SPLITS * GROUPS)).to(tl.int64)
    share = (TILES + SPLITS - 1) // SPLITS
    last = tl.minimum((split + 1) * share, TILES)
    count = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    spread = tl.full((), 0.0, tl.float32)
    # Averages are taken relative to the first one, so that what all have in common costs no digits.
    begin = (sample * TILES + split * share) * C + group * width
    pivot = tl.load(center + begin, mask=split * share < TILES, other=0.0)
    for step in range((tl.maximum(last - split * share, 0) * width + BLOCK - 1) // BLOCK):
        at = step * BLOCK + tl.arange(0, BLOCK)
        tile = split * share + at // width
        ok = tile < last
        offset = (sample * TILES + tile) * C + group * width + at % width
        rows = tl.minimum(PLANE - tile % PLANE_TILES * TILE_ROWS, TILE_ROWS)
        weight = tl.where(ok, rows, 0).to(tl.float32)
        values = tl.where(ok, tl.load(center + offset, mask=ok, other=0.0) - pivot, 0.0)
        elements = tl.sum(weight, 0)
        here = tl.sum(weight * values, 0) / elements
        away = values - here
        inside = tl.sum(tl.load(squares + offset, mask=ok, other=0.0) + weight * away * away, 0)
        total = count + elements
        step_mean = here - mean
        mean += step_mean * elements / total
        spread += inside + step_mean * step_mean * count * elements / total
        count = total
    to = merged + ((sample * GROUPS + group) * SPLITS + split) * 3
    tl.store(to, count)
    tl.store(to + 1, mean + pivot)
    tl.store(to + 2, spread)


@triton.jit(do_not_specialize=["ROWS"])
def norm_rows_backward(
    grad, z, grad_z, gamma, beta, mean, rstd, partial, ROWS,
    C: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_z of a channel norm, and this program's sums of d and d h: partial [programs, 2, C] fp32."""
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    ok = channel < C
    weight = tl.load(gamma + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    offset_u = tl.load(beta + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    sum_d = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_dh = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for block in range(program, (ROWS + BLOCK_R - 1) // BLOCK_R, tl.num_programs(0)):
        row = (tl.zeros((BLOCK_R,), tl.int64) + block) * BLOCK_R + tl.arange(0, BLOCK_R)
        row_ok = row < ROWS
        offset = row[:, None] * C + channel[None, :]
        mask = row_ok[:, None] & ok[None, :]
        inverse = tl.load(rstd + row, mask=row_ok, other=0.0)[:, None]
        hat = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
        if NORM == 2:
            hat -= tl.load(mean + row, mask=row_ok, other=0.0)[:, None]
        hat = tl.where(mask, hat * inverse, 0.0)
        d = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        d *= activation_slope(hat * weight + offset_u, ACTIVATION)
        d = tl.where(mask, d, 0.0)
        sum_d += tl.sum(d, 0)
        sum_dh += tl.sum(d * hat, 0)
        e = d * weight
        result = e - hat * (tl.sum(e * hat, 1) / C)[:, None]
        if NORM == 2:
            result -= (tl.sum(e, 1) / C)[:, None]
        tl.store(grad_z + offset, (result * inverse).to(grad_z.dtype.element_ty), mask=mask)
    slot = partial + program * (2 * C) + channel
    tl.store(slot, sum_d, mask=ok)
    tl.store(slot + C, sum_dh, mask=ok)


@triton.jit(do_not_specialize=["POSITIONS", "SPLITS"])
def group_sums(
    grad, z, gamma, beta, mean, rstd, partial, POSITIONS, SPLITS,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [B, SPLITS, 2, C] fp32: sums of d and d h of a split. mean, rstd [B, C], spread over groups."""
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) % SPLITS
    rest = tl.program_id(0) // SPLITS
    sample = (rest // channel_tiles).to(tl.int64)
    channel = rest % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < C
    weight = tl.load(gamma + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    offset_u = tl.load(beta + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    center = tl.load(mean + sample * C + channel, mask=ok, other=0.0)[None, :]
    inverse = tl.load(rstd + sample * C + channel, mask=ok, other=0.0)[None, :]
    sum_d = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_dh = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for block in range(split, (POSITIONS + BLOCK_R - 1) // BLOCK_R, SPLITS):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < POSITIONS)[:, None] & ok[None, :]
        offset = (sample * POSITIONS + row)[:, None] * C + channel[None, :]
        hat = (tl.load(z + offset, mask=mask, other=0.0).to(tl.float32) - center) * inverse
        d = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, d * activation_slope(hat * weight + offset_u, ACTIVATION), 0.0)
        sum_d += tl.sum(d, 0)
        sum_dh += tl.sum(tl.where(mask, d * hat, 0.0), 0)
    slot = partial + (sample * SPLITS + split) * (2 * C) + channel
    tl.store(slot, sum_d, mask=ok)
    tl.store(slot + C, sum_dh, mask=ok)


@triton.jit(do_not_specialize=["POSITIONS"])
def group_rows_backward(
    grad, z, grad_z, gamma, beta, mean, rstd, grad_mean, grad_projection, POSITIONS,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_z of a group norm: rstd (gamma d - mean(e) - h mean(e h)); statistics [B, C], spread over groups."""
    tile, sample, channel = group_tile(POSITIONS, C, BLOCK_R, BLOCK_C)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = channel < C
    mask = (row < POSITIONS)[:, None] & ok[None, :]
    offset = (sample * POSITIONS + row)[:, None] * C + channel[None, :]
    at = sample * C + channel
    weight = tl.load(gamma + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    offset_u = tl.load(beta + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    inverse = tl.load(rstd + at, mask=ok, other=0.0)[None, :]
    hat = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
    hat = (hat - tl.load(mean + at, mask=ok, other=0.0)[None, :]) * inverse
    d = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    d *= activation_slope(hat * weight + offset_u, ACTIVATION)
    result = d * weight - tl.load(grad_mean + at, mask=ok, other=0.0)[None, :]
    result -= hat * tl.load(grad_projection + at, mask=ok, other=0.0)[None, :]
    tl.store(grad_z + offset, (result * inverse).to(grad_z.dtype.element_ty), mask=mask)
