"""Triton kernels of the convolution and of its adjoint: implicit GEMM over channel-last rows.

Tensors are [batch, 1..3 outer axes, H, W, channels], five spatial axes with missing ones of size 1. One program makes
BLOCK_M positions of one
(H, W) plane x BLOCK_N channels of one group, so the three outer coordinates are scalars: a dead outer tap is a trip
that its loop does not take.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.conv_nd.triton.device import end_tap, finish, first_tap, outer_position, product, source


@triton.jit
def conv_taps(
    x, weight, bias, y, kept, gamma, beta, mean, rstd, eps,
    D1, D2, D3, H, W, N1, N2, N3, NH, NW,
    KG: tl.constexpr, NG: tl.constexpr, GROUPS: tl.constexpr,
    AXIS1: tl.constexpr, AXIS2: tl.constexpr, AXIS3: tl.constexpr, AXIS4: tl.constexpr, AXIS5: tl.constexpr,
    TRANSPOSED: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = epilogue(sum over taps and channels); the K step runs inside one tap, so loads are whole channel rows.

    x [B, D1, D2, D3, H, W, GROUPS * KG], weight [GROUPS, taps, KG, NG], y and kept [B, N1, N2, N3, NH, NW, GROUPS *
    NG].
    """
    n_tiles: tl.constexpr = (NG + BLOCK_N - 1) // BLOCK_N
    chunks: tl.constexpr = (KG + BLOCK_K - 1) // BLOCK_K
    column = tl.program_id(0) % (n_tiles * GROUPS)
    tile = tl.program_id(0) // (n_tiles * GROUPS)
    m_tiles = (NH * NW + BLOCK_M - 1) // BLOCK_M
    group = column // n_tiles
    plane = tile // m_tiles
    batch, q1, q2, q3 = outer_position(plane, N1, N2, N3)
    m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < NH * NW
    q4 = m // NW
    q5 = m % NW
    n = column % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < NG
    k = tl.arange(0, BLOCK_K)
    weight += group * (AXIS1[0] * AXIS2[0] * AXIS3[0] * AXIS4[0] * AXIS5[0] * KG * NG)
    x += group * KG
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k1 in range(first_tap(q1, D1, AXIS1, TRANSPOSED), end_tap(q1, D1, AXIS1, TRANSPOSED)):
        r1, ok1 = source(q1, k1, D1, AXIS1, TRANSPOSED)
        for k2 in range(first_tap(q2, D2, AXIS2, TRANSPOSED), end_tap(q2, D2, AXIS2, TRANSPOSED)):
            r2, ok2 = source(q2, k2, D2, AXIS2, TRANSPOSED)
            for k3 in range(first_tap(q3, D3, AXIS3, TRANSPOSED), end_tap(q3, D3, AXIS3, TRANSPOSED)):
                r3, ok3 = source(q3, k3, D3, AXIS3, TRANSPOSED)
                plane_ok = ok1 & ok2 & ok3
                x_plane = x + (((batch.to(tl.int64) * D1 + r1) * D2 + r2) * D3 + r3) * H * W * (GROUPS * KG)
                w_plane = weight + ((k1 * AXIS2[0] + k2) * AXIS3[0] + k3) * (AXIS4[0] * AXIS5[0] * KG * NG)
                for step in range(AXIS4[0] * AXIS5[0] * chunks):
                    tap = step // chunks
                    c = step % chunks * BLOCK_K + k
                    r4, ok4 = source(q4, tap // AXIS5[0], H, AXIS4, TRANSPOSED)
                    r5, ok5 = source(q5, tap % AXIS5[0], W, AXIS5, TRANSPOSED)
                    x_mask = (row_ok & ok4 & ok5 & plane_ok)[:, None]
                    w_mask = n_ok[None, :]
                    if KG % BLOCK_K != 0:
                        x_mask = x_mask & (c < KG)[None, :]
                        w_mask = w_mask & (c < KG)[:, None]
                    position = r4 * W + r5
                    if WIDE:
                        position = position.to(tl.int64)
                    a = tl.load(x_plane + position[:, None] * (GROUPS * KG) + c[None, :], mask=x_mask, other=0.0)
                    b = tl.load(w_plane + (tap * KG + c)[:, None] * NG + n[None, :], mask=w_mask, other=0.0)
                    acc = product(a, b, acc, PRECISION)
    row = plane.to(tl.int64) * (NH * NW) + m
    finish(
        acc, y, kept, bias, gamma, beta, mean, rstd, eps, row, row_ok, tile.to(tl.int64), group * NG + n, n_ok,
        GROUPS * NG, NORM, ACTIVATION, KEEP,
    )  # fmt: skip


@triton.jit
def conv_packed(
    x, weight, bias, y, kept, gamma, beta, mean, rstd, eps,
    D1, D2, D3, H, W, N1, N2, N3, NH, NW,
    KG: tl.constexpr, NG: tl.constexpr, GROUPS: tl.constexpr,
    AXIS1: tl.constexpr, AXIS2: tl.constexpr, AXIS3: tl.constexpr, AXIS4: tl.constexpr, AXIS5: tl.constexpr,
    TRANSPOSED: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`conv_taps` for few input channels: the taps of the last three axes and the channels share the K axis of the
    product.

    With 2 channels and 27 inner taps K is 54, padded to 64; a K step per tap would pad 2 to 16 and waste seven
    eighths of the product.
    """
    n_tiles: tl.constexpr = (NG + BLOCK_N - 1) // BLOCK_N
    packed: tl.constexpr = AXIS3[0] * AXIS4[0] * AXIS5[0] * KG
    column = tl.program_id(0) % (n_tiles * GROUPS)
    tile = tl.program_id(0) // (n_tiles * GROUPS)
    m_tiles = (NH * NW + BLOCK_M - 1) // BLOCK_M
    group = column // n_tiles
    plane = tile // m_tiles
    batch, q1, q2, q3 = outer_position(plane, N1, N2, N3)
    m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < NH * NW
    q4 = m // NW
    q5 = m % NW
    n = column % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < NG
    weight += group * (AXIS1[0] * AXIS2[0] * packed * NG)
    x += group * KG
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k1 in range(first_tap(q1, D1, AXIS1, TRANSPOSED), end_tap(q1, D1, AXIS1, TRANSPOSED)):
        r1, ok1 = source(q1, k1, D1, AXIS1, TRANSPOSED)
        for k2 in range(first_tap(q2, D2, AXIS2, TRANSPOSED), end_tap(q2, D2, AXIS2, TRANSPOSED)):
            r2, ok2 = source(q2, k2, D2, AXIS2, TRANSPOSED)
            x_volume = x + ((batch.to(tl.int64) * D1 + r1) * D2 + r2) * D3 * H * W * (GROUPS * KG)
            w_volume = weight + (k1 * AXIS2[0] + k2) * (packed * NG)
            for step in range((packed + BLOCK_K - 1) // BLOCK_K):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                tap = k // KG
                r3, ok3 = source(q3, tap // (AXIS4[0] * AXIS5[0]), D3, AXIS3, TRANSPOSED)
                r4, ok4 = source(q4[:, None], (tap // AXIS5[0] % AXIS4[0])[None, :], H, AXIS4, TRANSPOSED)
                r5, ok5 = source(q5[:, None], (tap % AXIS5[0])[None, :], W, AXIS5, TRANSPOSED)
                k_ok = (k < packed) & ok3 & ok1 & ok2
                x_mask = row_ok[:, None] & k_ok[None, :] & ok4 & ok5
                position = (r3[None, :] * H + r4) * W + r5
                if WIDE:
                    position = position.to(tl.int64)
                a = tl.load(x_volume + position * (GROUPS * KG) + (k % KG)[None, :], mask=x_mask, other=0.0)
                b = tl.load(
                    w_volume + k[:, None] * NG + n[None, :], mask=(k < packed)[:, None] & n_ok[None, :], other=0.0
                )
                acc = product(a, b, acc, PRECISION)
    row = plane.to(tl.int64) * (NH * NW) + m
    finish(
        acc, y, kept, bias, gamma, beta, mean, rstd, eps, row, row_ok, tile.to(tl.int64), group * NG + n, n_ok,
        GROUPS * NG, NORM, ACTIVATION, KEEP,
    )  # fmt: skip
