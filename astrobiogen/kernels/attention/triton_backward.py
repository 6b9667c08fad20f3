"""Backward kernels: row constants, dQ (one program per query block and head) and dK, dV (one per key block and
key/value head).

dK and dV of a group are summed over its query heads inside one program, so there is no per-head buffer and no atomic:
bitwise repeatable. q and k come packed: rotated, in the internal column order.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.attention.triton_device import (
    LOG2E,
    finite,
    key_range,
    load_columns,
    load_part,
    log2_scores,
    only_finite,
    product,
    query_range,
    row_pointers,
    store_columns,
    store_turned_back,
    tile_bounds,
    visible_keys,
)


@triton.jit
def row_constants_kernel(
    grad, out, lse, rest, grad_lse, log_sums, delta, factors,
    g_batch, g_token, g_head, o_batch, o_token, o_head, heads, queries,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, G_UNIT: tl.constexpr, O_UNIT: tl.constexpr, REST: tl.constexpr,
    GRAD_LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, padded] = <dO, O> - dlse with O as it was before rounding, and the log-sum-exp in units of log 2:
    +Inf for a row that sees nothing or lies behind the last query, so that its probabilities are 0, and NaN for a row
    whose dO is not finite, so that all that it sees hears it. Without REST also `factors`, by which dO (here too) must
    be multiplied for the rounding of the log-sum-exp. Grid (B Hq, padded / BLOCK).
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, local = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    live = first + local < queries
    g_base = grad + (batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head) * G_UNIT
    o_base = out + (batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head) * O_UNIT
    column = tl.arange(0, COLUMNS)
    a = load_columns(row_pointers(g_base, first, local, g_token, G_UNIT), live, column, DIM).to(tl.float32)
    b = load_columns(row_pointers(o_base, first, local, o_token, O_UNIT), live, column, DIM).to(tl.float32)
    index = tl.program_id(0).to(tl.int64) * queries + first + local
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(1) * BLOCK + first + local
    log_sum = tl.load(lse + index, mask=live, other=float("-inf"))
    wrong = tl.max(tl.where(finite(a), 0, 1), 1) > 0
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if REST:
        r_base = rest + (batch.to(tl.int64) * queries * heads + head) * DIM
        left = load_columns(row_pointers(r_base, first, local, heads, DIM), live, column, DIM).to(tl.int32)
        b = (b.to(tl.int32, bitcast=True) + left).to(tl.float32, bitcast=True)
    else:
        # What the kernels will subtract is rounded once more, to log_sum * LOG2E.
        lost = tl.fma(log_sum, LOG2E, -(log_sum * LOG2E))
        factor = tl.load(rest + index, mask=live, other=1.0) * tl.exp2(-lost)
        factor = tl.where(finite(factor), factor, 1.0)
        tl.store(factors + to, factor)
        a = a * factor[:, None]
    value = tl.sum(tl.where(b == 0.0, 0.0, a * b), 1)  # a row that sees nothing is 0 whatever dO is
    if GRAD_LSE:
        value -= factor * tl.load(grad_lse + index, mask=live, other=0.0).to(tl.float32)
    tl.store(delta + to, value)
    log_sum = tl.where(wrong & (log_sum != float("-inf")), float("nan"), log_sum * LOG2E)
    tl.store(log_sums + to, tl.where(log_sum == float("-inf"), float("inf"), log_sum))


@triton.jit
def probabilities(raw, log_sum, visible, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """P and the scores it comes from, in units of log 2; a hidden pair has P = 0."""
    s = log2_scores(raw, scale, softcap, SOFTCAP)
    p = tl.exp2(s - log_sum)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    return p, s


@triton.jit
def score_gradient(p, s, grad_p, delta, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """dS = P (dP - delta), times the derivative of the soft cap. A hidden pair, whose P is 0, gets 0 whatever its
    factors are; asking the mask again would keep it in registers across a product.
    """
    ds = p * (grad_p - delta)
    if SOFTCAP:
        ds = ds * (1.0 - (s / softcap) * (s / softcap))
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def query_tiles(
    dq, dq_tail, q, q_tail, g, g_tail, log_sum, delta, k_base, v_base, k_token, v_token, begin, end, keys, low, high,
    scale, softcap,
    MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr, K_FINITE: tl.constexpr, SOFTCAP: tl.constexpr, LOWER: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq += dS K over the keys begin .. end - 1. Rows that see a key that is not finite have log-sum NaN."""
    local = tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        n = first + local
        exists = n < keys
        k_rows = row_pointers(k_base, first, local, k_token, K_UNIT)
        v_rows = row_pointers(v_base, first, local, v_token, V_UNIT)
        k = load_part(k_rows, exists, 0, MAIN, K_WIDTH, MASKED)
        v = load_part(v_rows, exists, 0, MAIN, V_WIDTH, MASKED)
        raw = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        grad_p = product(g, tl.trans(v), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        if TAIL > 0:
            k_tail = load_part(k_rows, exists, MAIN, TAIL, K_WIDTH, MASKED)
            v_tail = load_part(v_rows, exists, MAIN, TAIL, V_WIDTH, MASKED)
            raw = product(q_tail, tl.trans(k_tail), raw, PRECISION)
            grad_p = product(g_tail, tl.trans(v_tail), grad_p, PRECISION)
        visible = visible_keys(n, low, high, LOWER)
        p, s = probabilities(raw, log_sum[:, None], visible, scale, softcap, SOFTCAP, MASKED)
        ds = score_gradient(p, s, grad_p, delta[:, None], softcap, SOFTCAP, MASKED).to(k.dtype)
        if MASKED and not K_FINITE:
            k = only_finite(k)
            if TAIL > 0:
                k_tail = only_finite(k_tail)
        dq = product(ds, k, dq, PRECISION)
        if TAIL > 0:
            dq_tail = product(ds, k_tail, dq_tail, PRECISION)
    return dq, dq_tail


@triton.jit
def grad_query_kernel(
    q, k, v, grad, log_sums, delta, cos, sin, starts, ends, grad_q,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    heads, group, queries, padded, keys, angle_batch, angle_first, scale, softcap, out_scale, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr, G_WIDTH: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr, K_FINITE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, turned back. Grid (B Hq, query blocks), longest first."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, local = block * BLOCK_M, tl.arange(0, BLOCK_M)
    m = first + local
    live = m < queries
    wide, kv_head = batch.to(tl.int64), (head // group).to(tl.int64)
    q_rows = row_pointers(q + (wide * q_batch + head.to(tl.int64) * q_head) * Q_UNIT, first, local, q_token, Q_UNIT)
    g_rows = row_pointers(grad + (wide * g_batch + head.to(tl.int64) * g_head) * G_UNIT, first, local, g_token, G_UNIT)
    k_base = k + (wide * k_batch + kv_head * k_head) * K_UNIT
    v_base = v + (wide * v_batch + kv_head * v_head) * V_UNIT
    q_main, g_main = load_part(q_rows, live, 0, MAIN, Q_WIDTH, True), load_part(g_rows, live, 0, MAIN, G_WIDTH, True)
    q_tail, g_tail = q_main, g_main
    dq = tl.zeros([BLOCK_M, MAIN], tl.float32)
    dq_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        q_tail = load_part(q_rows, live, MAIN, TAIL, Q_WIDTH, True)
        g_tail = load_part(g_rows, live, MAIN, TAIL, G_WIDTH, True)
    row = tl.program_id(0).to(tl.int64) * padded + m
    log_sum, mean = tl.load(log_sums + row), tl.load(delta + row)
    offset = keys - queries
    low, high = key_range(tl.minimum(m, queries - 1), offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    low_first, high_first = key_range(first, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = key_range(last, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin, clean, edge, end = tile_bounds(low_first, low_last, high_first, high_last, keys, BLOCK_N)
    LOWER: tl.constexpr = WINDOW or PACKED
    if LOWER:
        dq, dq_tail = query_tiles(
            dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, begin, clean,
            keys, low, high, scale, softcap,
            MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, K_FINITE, SOFTCAP, LOWER, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    dq, dq_tail = query_tiles(
        dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, clean, edge,
        keys, low, high, scale, softcap,
        MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, K_FINITE, SOFTCAP, LOWER, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    dq, dq_tail = query_tiles(
        dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, edge, end,
        keys, low, high, scale, softcap,
        MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, K_FINITE, SOFTCAP, LOWER, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    to = row_pointers(grad_q + (wide * queries * heads + head) * DIM, first, local, heads, DIM)
    cos_rows = row_pointers(cos + wide * angle_batch, angle_first + first, local, ROTARY, 1)
    sin_rows = row_pointers(sin + wide * angle_batch, angle_first + first, local, ROTARY, 1)
    store_turned_back(
        to, dq * out_scale, dq_tail * out_scale, cos_rows, sin_rows, live, DIM, MAIN, TAIL, ROTARY, INTERLEAVED
    )


@triton.jit
def key_tiles(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, n, q_base, g_base, log_sums, delta, q_token, g_token, begin, end,
    queries, keys, starts, ends, scale, softcap, window,
    MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, G_WIDTH: tl.constexpr, Q_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr, Q_FINITE: tl.constexpr, G_FINITE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dv += P^T dO and dk += dS^T Q over the queries begin .. end - 1 of one head. Rows behind the last query have
    log-sum +Inf, so P = 0; rows of which q or dO is not finite have log-sum NaN, so P = NaN where they see.
    """
    local = tl.arange(0, BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        m = first + local
        live = m < queries
        q_rows = row_pointers(q_base, first, local, q_token, Q_UNIT)
        g_rows = row_pointers(g_base, first, local, g_token, G_UNIT)
        q = load_part(q_rows, live, 0, MAIN, Q_WIDTH, True)
        g = load_part(g_rows, live, 0, MAIN, G_WIDTH, True)
        log_sum, mean = tl.load(log_sums + m), tl.load(delta + m)
        seen = tl.minimum(m, queries - 1) if PACKED else m
        low, high = key_range(seen, keys - queries, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
        visible = n[:, None] < high[None, :]
        if WINDOW or PACKED:
            visible = visible & (n[:, None] >= low[None, :])
        raw = product(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_M], tl.float32), PRECISION)
        if TAIL > 0:
            q_tail = load_part(q_rows, live, MAIN, TAIL, Q_WIDTH, True)
            g_tail = load_part(g_rows, live, MAIN, TAIL, G_WIDTH, True)
            raw = product(k_tail, tl.trans(q_tail), raw, PRECISION)
        p, s = probabilities(raw, log_sum[None, :], visible, scale, softcap, SOFTCAP, MASKED)
        half_p = p.to(g.dtype)
        if MASKED and not G_FINITE:
            g = only_finite(g)
            if TAIL > 0:
                g_tail = only_finite(g_tail)
        dv = product(half_p, g, dv, PRECISION)
        grad_p = product(v, tl.trans(g), tl.zeros([k.shape[0], BLOCK_M], tl.float32), PRECISION)
        if TAIL > 0:
            dv_tail = product(half_p, g_tail, dv_tail, PRECISION)
            grad_p = product(v_tail, tl.trans(g_tail), grad_p, PRECISION)
        ds = score_gradient(p, s, grad_p, mean[None, :], softcap, SOFTCAP, MASKED).to(q.dtype)
        if MASKED and not Q_FINITE:
            q = only_finite(q)
            if TAIL > 0:
                q_tail = only_finite(q_tail)
        dk = product(ds, q, dk, PRECISION)
        if TAIL > 0:
            dk_tail = product(ds, q_tail, dk_tail, PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def grad_key_kernel(
    q, k, v, grad, log_sums, delta, cos, sin, starts, ends, grad_k, grad_v,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    heads, group, queries, padded, keys, angle_batch, angle_first, scale, softcap, out_scale, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr, G_WIDTH: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    G_UNIT: tl.constexpr, Q_FINITE: tl.constexpr, G_FINITE: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK, turned back, and dV. Grid (B Hkv, key blocks): the first block, which most queries see, starts first."""
    kv_heads = heads // group
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    start, local = tl.program_id(1) * BLOCK_N, tl.arange(0, BLOCK_N)
    n = start + local
    exists = n < keys
    wide = batch.to(tl.int64)
    k_rows = row_pointers(k + (wide * k_batch + kv_head.to(tl.int64) * k_head) * K_UNIT, start, local, k_token, K_UNIT)
    v_rows = row_pointers(v + (wide * v_batch + kv_head.to(tl.int64) * v_head) * V_UNIT, start, local, v_token, V_UNIT)
    k_main = load_part(k_rows, exists, 0, MAIN, K_WIDTH, True)
    v_main = load_part(v_rows, exists, 0, MAIN, V_WIDTH, True)
    k_tail, v_tail = k_main, v_main
    if TAIL > 0:
        k_tail = load_part(k_rows, exists, MAIN, TAIL, K_WIDTH, True)
        v_tail = load_part(v_rows, exists, MAIN, TAIL, V_WIDTH, True)
    dk, dv = tl.zeros([BLOCK_N, MAIN], tl.float32), tl.zeros([BLOCK_N, MAIN], tl.float32)
    dk_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32)
    dv_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32)
    last = tl.minimum(start + BLOCK_N, keys) - 1
    low_first, high_first = query_range(start, keys - queries, queries, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = query_range(last, keys - queries, queries, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin = tl.maximum(low_first, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(high_last, queries)
    clean = tl.cdiv(tl.maximum(low_last, 0), BLOCK_M) * BLOCK_M
    if ONE_LOOP:
        clean, edge = end, end
    elif WINDOW or PACKED:
        edge = tl.maximum(tl.minimum(high_first, end), 0) // BLOCK_M * BLOCK_M
        has_clean = edge > clean
        clean = tl.where(has_clean, clean, begin)
        edge = tl.where(has_clean, edge, begin)
    else:
        clean, edge = tl.minimum(clean, end), end
    for g in range(group):
        head = (kv_head * group + g).to(tl.int64)
        q_base = q + (wide * q_batch + head * q_head) * Q_UNIT
        g_base = grad + (wide * g_batch + head * g_head) * G_UNIT
        row = (tl.program_id(0) * group + g).to(tl.int64) * padded
        if ONE_LOOP or CAUSAL or WINDOW or PACKED:
            dk, dk_tail, dv, dv_tail = key_tiles(
                dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, log_sums + row,
                delta + row, q_token, g_token, begin, clean, queries, keys, starts, ends, scale, softcap, window,
                MAIN, TAIL, Q_WIDTH, G_WIDTH, Q_UNIT, G_UNIT, Q_FINITE, G_FINITE, CAUSAL, WINDOW, SOFTCAP, PACKED, True,
                PRECISION, BLOCK_M,
            )  # fmt: skip
        if not ONE_LOOP:
            dk, dk_tail, dv, dv_tail = key_tiles(
                dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, log_sums + row,
                delta + row, q_token, g_token, clean, edge, queries, keys, starts, ends, scale, softcap, window,
                MAIN, TAIL, Q_WIDTH, G_WIDTH, Q_UNIT, G_UNIT, Q_FINITE, G_FINITE, CAUSAL, WINDOW, SOFTCAP, PACKED,
                False, PRECISION, BLOCK_M,
            )  # fmt: skip
        if not ONE_LOOP and (WINDOW or PACKED):
            dk, dk_tail, dv, dv_tail = key_tiles(
                dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, log_sums + row,
                delta + row, q_token, g_token, edge, end, queries, keys, starts, ends, scale, softcap, window,
                MAIN, TAIL, Q_WIDTH, G_WIDTH, Q_UNIT, G_UNIT, Q_FINITE, G_FINITE, CAUSAL, WINDOW, SOFTCAP, PACKED, True,
                PRECISION, BLOCK_M,
            )  # fmt: skip
    to = (wide * keys * kv_heads + kv_head) * DIM
    # dV leaves first: while dK is turned, its registers are needed for the angles.
    v_to = row_pointers(grad_v + to, start, local, kv_heads, DIM)
    store_columns(v_to, dv, exists, tl.arange(0, MAIN), DIM)
    if TAIL > 0:
        store_columns(v_to, dv_tail, exists, MAIN + tl.arange(0, TAIL), DIM)
    cos_rows = row_pointers(cos + wide * angle_batch, angle_first + start, local, ROTARY, 1)
    sin_rows = row_pointers(sin + wide * angle_batch, angle_first + start, local, ROTARY, 1)
    store_turned_back(
        row_pointers(grad_k + to, start, local, kv_heads, DIM), dk * out_scale, dk_tail * out_scale, cos_rows, sin_rows,
        exists, DIM, MAIN, TAIL, ROTARY, INTERLEAVED,
    )  # fmt: skip
