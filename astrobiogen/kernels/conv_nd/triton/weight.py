"""Triton kernels of the convolution's weight gradient, per tap a [channels x positions] x [positions x outputs]
product, and of its bias gradient.

The positions are split over programs by outer plane, as many as the grid has; each writes its own fp32 partial and
the launcher adds the partials in a fixed order, so the result has the same bits on every run. Planes that a tap cannot
reach are skipped.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.conv_nd.triton.device import outer_position, product, source


@triton.jit(do_not_specialize=["PLANES"])
def weight_taps(
    x, grad, partial,
    PLANES, D1, D2, D3, H, W, N1, N2, N3, NH, NW,
    KG: tl.constexpr, NG: tl.constexpr, GROUPS: tl.constexpr,
    AXIS1: tl.constexpr, AXIS2: tl.constexpr, AXIS3: tl.constexpr, AXIS4: tl.constexpr, AXIS5: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [splits, GROUPS, taps, KG, NG]: one tap, BLOCK_M input channels x BLOCK_N outputs, over the planes of
    one split.

    x [B, D1, D2, D3, H, W, GROUPS * KG], grad [B, N1, N2, N3, NH, NW, GROUPS * NG], PLANES = B * N1 * N2 * N3.
    """
    taps: tl.constexpr = AXIS1[0] * AXIS2[0] * AXIS3[0] * AXIS4[0] * AXIS5[0]
    m_tiles: tl.constexpr = (KG + BLOCK_M - 1) // BLOCK_M
    n_tiles: tl.constexpr = (NG + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0)
    tile = index % (m_tiles * n_tiles)
    tap = index // (m_tiles * n_tiles) % taps
    group = index // (m_tiles * n_tiles * taps) % GROUPS
    split = index // (m_tiles * n_tiles * taps * GROUPS)
    splits = tl.num_programs(0) // (m_tiles * n_tiles * taps * GROUPS)
    k5 = tap % AXIS5[0]
    k4 = tap // AXIS5[0] % AXIS4[0]
    k3 = tap // (AXIS5[0] * AXIS4[0]) % AXIS3[0]
    k2 = tap // (AXIS5[0] * AXIS4[0] * AXIS3[0]) % AXIS2[0]
    k1 = tap // (AXIS5[0] * AXIS4[0] * AXIS3[0] * AXIS2[0])
    c = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    share = (PLANES + splits - 1) // splits  # not PLANES * split // splits: that product may pass 2^31
    for at in range(tl.minimum(share, tl.maximum(PLANES - split * share, 0))):
        plane = split * share + at
        batch, q1, q2, q3 = outer_position(plane, N1, N2, N3)
        r1, ok1 = source(q1, k1, D1, AXIS1, False)
        r2, ok2 = source(q2, k2, D2, AXIS2, False)
        r3, ok3 = source(q3, k3, D3, AXIS3, False)
        steps = tl.where(ok1 & ok2 & ok3, (NH * NW + BLOCK_K - 1) // BLOCK_K, 0)
        x_plane = x + (((batch.to(tl.int64) * D1 + r1) * D2 + r2) * D3 + r3) * H * W * (GROUPS * KG) + group * KG
        g_plane = grad + plane.to(tl.int64) * NH * NW * (GROUPS * NG) + group * NG
        for step in range(steps):
            p = step * BLOCK_K + tl.arange(0, BLOCK_K)
            p_ok = p < NH * NW
            r4, ok4 = source(p // NW, k4, H, AXIS4, False)
            r5, ok5 = source(p % NW, k5, W, AXIS5, False)
            x_mask = (p_ok & ok4 & ok5)[:, None]
            g_mask = p_ok[:, None]
            if KG % BLOCK_M != 0:
                x_mask = x_mask & (c < KG)[None, :]
            if NG % BLOCK_N != 0:
                g_mask = g_mask & (n < NG)[None, :]
            position = r4 * W + r5
            if WIDE:
                position = position.to(tl.int64)
                p = p.to(tl.int64)
            a = tl.load(x_plane + position[:, None] * (GROUPS * KG) + c[None, :], mask=x_mask, other=0.0)
            b = tl.load(g_plane + p[:, None] * (GROUPS * NG) + n[None, :], mask=g_mask, other=0.0)
            acc = product(tl.trans(a), b, acc, PRECISION)
    slot = ((split * GROUPS + group) * taps + tap).to(tl.int64) * (KG * NG)
    tl.store(partial + slot + c[:, None] * NG + n[None, :], acc, mask=(c < KG)[:, None] & (n < NG)[None, :])


@triton.jit(do_not_specialize=["PLANES"])
def weight_packed(
    x, grad, partial,
    PLANES, D1, D2, D3, H, W, N1, N2, N3, NH, NW,
    KG: tl.constexpr, NG: tl.constexpr, GROUPS: tl.constexpr,
    AXIS1: tl.constexpr, AXIS2: tl.constexpr, AXIS3: tl.constexpr, AXIS4: tl.constexpr, AXIS5: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`weight_taps` for few input channels: the rows of the product are (tap of the last three axes, channel) pairs."""
    packed: tl.constexpr = AXIS3[0] * AXIS4[0] * AXIS5[0] * KG
    outer: tl.constexpr = AXIS1[0] * AXIS2[0]
    m_tiles: tl.constexpr = (packed + BLOCK_M - 1) // BLOCK_M
    n_tiles: tl.constexpr = (NG + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0)
    tile = index % (m_tiles * n_tiles)
    k12 = index // (m_tiles * n_tiles) % outer
    group = index // (m_tiles * n_tiles * outer) % GROUPS
    split = index // (m_tiles * n_tiles * outer * GROUPS)
    splits = tl.num_programs(0) // (m_tiles * n_tiles * outer * GROUPS)
    k = tile // n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = k // KG
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    share = (PLANES + splits - 1) // splits  # not PLANES * split // splits: that product may pass 2^31
    for at in range(tl.minimum(share, tl.maximum(PLANES - split * share, 0))):
        plane = split * share + at
        batch, q1, q2, q3 = outer_position(plane, N1, N2, N3)
        r1, ok1 = source(q1, k12 // AXIS2[0], D1, AXIS1, False)
        r2, ok2 = source(q2, k12 % AXIS2[0], D2, AXIS2, False)
        r3, ok3 = source(q3, tap // (AXIS4[0] * AXIS5[0]), D3, AXIS3, False)
        steps = tl.where(ok1 & ok2, (NH * NW + BLOCK_K - 1) // BLOCK_K, 0)
        x_volume = x + ((batch.to(tl.int64) * D1 + r1) * D2 + r2) * D3 * H * W * (GROUPS * KG) + group * KG
        g_plane = grad + plane.to(tl.int64) * NH * NW * (GROUPS * NG) + group * NG
        k_ok = (k < packed) & ok3
        for step in range(steps):
            p = step * BLOCK_K + tl.arange(0, BLOCK_K)
            p_ok = p < NH * NW
            r4, ok4 = source((p // NW)[:, None], (tap // AXIS5[0] % AXIS4[0])[None, :], H, AXIS4, False)
            r5, ok5 = source((p % NW)[:, None], (tap % AXIS5[0])[None, :], W, AXIS5, False)
            position = (r3[None, :] * H + r4) * W + r5
            x_mask = p_ok[:, None] & k_ok[None, :] & ok4 & ok5
            if WIDE:
                position = position.to(tl.int64)
                p = p.to(tl.int64)
            a = tl.load(x_volume + position * (GROUPS * KG) + (k % KG)[None, :], mask=x_mask, other=0.0)
            b = tl.load(
                g_plane + p[:, None] * (GROUPS * NG) + n[None, :], mask=p_ok[:, None] & (n < NG)[None, :], other=0.0
            )
            acc = product(tl.trans(a), b, acc, PRECISION)
    slot = ((split * GROUPS + group) * outer + k12).to(tl.int64) * (packed * NG)
    tl.store(partial + slot + k[:, None] * NG + n[None, :], acc, mask=(k < packed)[:, None] & (n < NG)[None, :])


@triton.jit(do_not_specialize=["ROWS"])
def row_sums(grad, partial, ROWS, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial [programs, C] fp32: sums of every `programs`-th tile of rows of grad [ROWS, C]; the bias gradient."""
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    programs = tl.num_programs(0) // channel_tiles
    program = tl.program_id(0) // channel_tiles
    channel = tl.program_id(0) % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < C
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for tile in range(program, (ROWS + BLOCK_R - 1) // BLOCK_R, programs):
        row = (tl.zeros((BLOCK_R,), tl.int64) + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < ROWS)[:, None] & ok[None, :]
        total += tl.sum(tl.load(grad + row[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(partial + program * C + channel, total, mask=ok)
