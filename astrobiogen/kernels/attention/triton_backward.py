"""Backward kernels: row constants, dQ (one program per query block and head) and dK, dV (one per key block and
key/value head).

dK and dV of a group are summed over its query heads inside one program, so there is no per-head buffer and no atomic:
bitwise repeatable.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.attention.triton_device import (
    LOG2E,
    key_range,
    load_columns,
    log2_scores,
    product,
    query_range,
    store_columns,
    tile_bounds,
    tile_rows,
    turn,
)


@triton.jit
def delta_kernel(
    grad, out, grad_lse, delta,
    g_batch, g_token, g_head, o_batch, o_token, o_head, heads, queries,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, GRAD_LSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, Sq] = <dO, O> - dlse. Grid (B Hq, blocks)."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, local = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    rows = first + local
    row_mask = rows < queries
    g_base = grad + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    o_base = out + batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
    a = load_columns(g_base, first, local, row_mask, g_token, 0, COLUMNS, DIM, 0, False).to(tl.float32)
    b = load_columns(o_base, first, local, row_mask, o_token, 0, COLUMNS, DIM, 0, False).to(tl.float32)
    value = tl.sum(a * b, 1)
    index = tl.program_id(0).to(tl.int64) * queries + rows
    if GRAD_LSE:
        value -= tl.load(grad_lse + index, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(delta + index, value, mask=row_mask)


@triton.jit
def load_part(rows_pointer, row_mask, START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """A [rows, COUNT] tile at column START of rows that have WIDTH readable columns; zero elsewhere."""
    column = START + tl.arange(0, COUNT)
    if START + COUNT <= WIDTH:
        return tl.load(rows_pointer + column[None, :], mask=row_mask[:, None], other=0.0)
    return tl.load(rows_pointer + column[None, :], mask=row_mask[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def score_gradient(raw, grad_p, log_sum, delta, scale, softcap, visible, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """P and dS of one tile. A hidden pair gets exactly zero, even where its dP is not finite."""
    s = log2_scores(raw, scale, softcap, SOFTCAP)
    p = tl.exp2(s - log_sum)
    ds = p * (grad_p - delta)
    if SOFTCAP:
        ds = ds * (1.0 - (s / softcap) * (s / softcap))
    if MASKED:
        p = tl.where(visible, p, 0.0)
        ds = tl.where(visible, ds, 0.0)
    return p, ds


@triton.jit
def query_tiles(
    dq, dq_tail, q, q_tail, g, g_tail, log_sum, delta, k_base, v_base, k_token, v_token, begin, end, keys, low, high,
    scale, softcap,
    MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq += dS K over the keys begin .. end - 1."""
    local = tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        n = first + local
        exists = n < keys
        k_rows = tile_rows(k_base, first, local, k_token)
        v_rows = tile_rows(v_base, first, local, v_token)
        k = load_part(k_rows, exists, 0, MAIN, K_WIDTH)
        v = load_part(v_rows, exists, 0, MAIN, V_WIDTH)
        raw = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        grad_p = product(g, tl.trans(v), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        if TAIL > 0:
            k_tail = load_part(k_rows, exists, MAIN, TAIL, K_WIDTH)
            v_tail = load_part(v_rows, exists, MAIN, TAIL, V_WIDTH)
            raw = product(q_tail, tl.trans(k_tail), raw, PRECISION)
            grad_p = product(g_tail, tl.trans(v_tail), grad_p, PRECISION)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        _p, ds = score_gradient(raw, grad_p, log_sum[:, None], delta[:, None], scale, softcap, visible, SOFTCAP, MASKED)
        ds = ds.to(k.dtype)
        dq = product(ds, k, dq, PRECISION)
        if TAIL > 0:
            dq_tail = product(ds, k_tail, dq_tail, PRECISION)
    return dq, dq_tail


@triton.jit
def load_rows_constants(lse, delta, index, row_mask):
    """The log-sum-exp in units of log 2 and delta; a row that is absent or sees nothing gets +Inf, so that its
    probabilities are 0.
    """
    log_sum = tl.load(lse + index, mask=row_mask, other=float("inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E)
    return log_sum, tl.load(delta + index, mask=row_mask, other=0.0)


@triton.jit
def grad_query_kernel(
    q, k, v, grad, lse, delta, cos, sin, starts, ends, grad_q,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    heads, group, queries, keys, angle_batch, angle_first, scale, softcap, out_scale, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    G_WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, turned back. q and k are rotated already, in internal column order. Grid (B Hq, query blocks), longest
    first.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, local = block * BLOCK_M, tl.arange(0, BLOCK_M)
    m = first + local
    row_mask = m < queries
    q_rows = tile_rows(q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head, first, local, q_token)
    g_rows = tile_rows(grad + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head, first, local, g_token)
    k_base = k + batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    v_base = v + batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    q_main = load_part(q_rows, row_mask, 0, MAIN, Q_WIDTH)
    g_main = load_part(g_rows, row_mask, 0, MAIN, G_WIDTH)
    q_tail, g_tail = q_main, g_main
    dq = tl.zeros([BLOCK_M, MAIN], tl.float32)
    dq_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        q_tail = load_part(q_rows, row_mask, MAIN, TAIL, Q_WIDTH)
        g_tail = load_part(g_rows, row_mask, MAIN, TAIL, G_WIDTH)
    log_sum, mean = load_rows_constants(lse, delta, tl.program_id(0).to(tl.int64) * queries + m, row_mask)
    offset = keys - queries
    low, high = key_range(tl.minimum(m, queries - 1), offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    low_first, high_first = key_range(first, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = key_range(last, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin, clean, edge, end = tile_bounds(low_first, low_last, high_first, high_last, keys, BLOCK_N)
    if WINDOW or PACKED:
        dq, dq_tail = query_tiles(
            dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, begin,
            clean, keys, low, high,
            scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    dq, dq_tail = query_tiles(
        dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, clean, edge,
        keys, low, high,
        scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    dq, dq_tail = query_tiles(
        dq, dq_tail, q_main, q_tail, g_main, g_tail, log_sum, mean, k_base, v_base, k_token, v_token, edge, end,
        keys, low, high,
        scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    angles = batch.to(tl.int64) * angle_batch
    to = grad_q + (batch.to(tl.int64) * queries * heads + head) * DIM
    dq = dq * out_scale
    if ROTARY > 0:
        dq = turn(dq, cos + angles, sin + angles, angle_first + first, local, row_mask, 0, ROTARY, -1.0)
    store_columns(to, dq, first, local, row_mask, heads * DIM, 0, MAIN, DIM, ROTARY, INTERLEAVED)
    if TAIL > 0:
        dq_tail = dq_tail * out_scale
        if 2 * ROTARY > MAIN:
            dq_tail = turn(
                dq_tail, cos + angles, sin + angles, angle_first + first, local, row_mask, MAIN, ROTARY, -1.0
            )
        store_columns(to, dq_tail, first, local, row_mask, heads * DIM, MAIN, TAIL, DIM, ROTARY, INTERLEAVED)


@triton.jit
def key_tiles(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, n, q_base, g_base, lse, delta, q_token, g_token, begin, end,
    queries, keys,
    starts, ends, scale, softcap, window,
    MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, G_WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dv += P^T dO and dk += dS^T Q over the queries begin .. end - 1 of one head. Rows behind the last query have
    lse = +Inf, so P = 0.
    """
    local = tl.arange(0, BLOCK_M)
    for first in range(begin, end, BLOCK_M):
        m = first + local
        row_mask = m < queries
        q_rows = tile_rows(q_base, first, local, q_token)
        g_rows = tile_rows(g_base, first, local, g_token)
        q = load_part(q_rows, row_mask, 0, MAIN, Q_WIDTH)
        g = load_part(g_rows, row_mask, 0, MAIN, G_WIDTH)
        log_sum, mean = load_rows_constants(lse, delta, m, row_mask)
        raw = product(k, tl.trans(q), tl.zeros([k.shape[0], BLOCK_M], tl.float32), PRECISION)
        grad_p = product(v, tl.trans(g), tl.zeros([k.shape[0], BLOCK_M], tl.float32), PRECISION)
        if TAIL > 0:
            q_tail = load_part(q_rows, row_mask, MAIN, TAIL, Q_WIDTH)
            g_tail = load_part(g_rows, row_mask, MAIN, TAIL, G_WIDTH)
            raw = product(k_tail, tl.trans(q_tail), raw, PRECISION)
            grad_p = product(v_tail, tl.trans(g_tail), grad_p, PRECISION)
        low, high = key_range(
            tl.minimum(m, queries - 1), keys - queries, keys, starts, ends, window, CAUSAL, WINDOW, PACKED
        )
        visible = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        p, ds = score_gradient(raw, grad_p, log_sum[None, :], mean[None, :], scale, softcap, visible, SOFTCAP, MASKED)
        p, ds = p.to(g.dtype), ds.to(q.dtype)
        dv = product(p, g, dv, PRECISION)
        dk = product(ds, q, dk, PRECISION)
        if TAIL > 0:
            dv_tail = product(p, g_tail, dv_tail, PRECISION)
            dk_tail = product(ds, q_tail, dk_tail, PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def grad_key_kernel(
    q, k, v, grad, lse, delta, cos, sin, starts, ends, grad_k, grad_v,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, g_batch, g_token, g_head,
    kv_heads, group, queries, keys, angle_batch, angle_first, scale, softcap, out_scale, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    G_WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK, turned back, and dV. Grid (B Hkv, key blocks): the first block, which most queries see, starts first."""
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    start = tl.program_id(1) * BLOCK_N
    local = tl.arange(0, BLOCK_N)
    n = start + local
    exists = n < keys
    k_rows = tile_rows(k + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head, start, local, k_token)
    v_rows = tile_rows(v + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head, start, local, v_token)
    k_main, v_main = load_part(k_rows, exists, 0, MAIN, K_WIDTH), load_part(v_rows, exists, 0, MAIN, V_WIDTH)
    k_tail, v_tail = k_main, v_main
    if TAIL > 0:
        k_tail, v_tail = load_part(k_rows, exists, MAIN, TAIL, K_WIDTH), load_part(v_rows, exists, MAIN, TAIL, V_WIDTH)
    dk, dv = tl.zeros([BLOCK_N, MAIN], tl.float32), tl.zeros([BLOCK_N, MAIN], tl.float32)
    dk_tail, dv_tail = (
        tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32),
        tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32),
    )
    last = tl.minimum(start + BLOCK_N, keys) - 1
    low_first, high_first = query_range(start, keys - queries, queries, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = query_range(last, keys - queries, queries, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin = tl.maximum(low_first, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(high_last, queries)
    clean = tl.cdiv(tl.maximum(low_last, 0), BLOCK_M) * BLOCK_M
    edge = end
    if WINDOW or PACKED:
        edge = tl.maximum(tl.minimum(high_first, end), 0) // BLOCK_M * BLOCK_M
        has_clean = edge > clean
        clean = tl.where(has_clean, clean, begin)
        edge = tl.where(has_clean, edge, begin)
    for g in range(group):
        head = kv_head * group + g
        q_base = q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        g_base = grad + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
        row = (tl.program_id(0) * group + g).to(tl.int64) * queries
        if CAUSAL or WINDOW or PACKED:
            dk, dk_tail, dv, dv_tail = key_tiles(
                dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, lse + row, delta + row,
                q_token, g_token,
                begin, tl.minimum(clean, end), queries, keys, starts, ends, scale, softcap, window,
                MAIN, TAIL, Q_WIDTH, G_WIDTH, CAUSAL, WINDOW, SOFTCAP, PACKED, True, PRECISION, BLOCK_M,
            )  # fmt: skip
        dk, dk_tail, dv, dv_tail = key_tiles(
            dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, lse + row, delta + row,
            q_token, g_token,
            clean, edge, queries, keys, starts, ends, scale, softcap, window,
            MAIN, TAIL, Q_WIDTH, G_WIDTH, CAUSAL, WINDOW, SOFTCAP, PACKED, False, PRECISION, BLOCK_M,
        )  # fmt: skip
        if WINDOW or PACKED:
            dk, dk_tail, dv, dv_tail = key_tiles(
                dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, n, q_base, g_base, lse + row, delta + row,
                q_token, g_token,
                edge, end, queries, keys, starts, ends, scale, softcap, window,
                MAIN, TAIL, Q_WIDTH, G_WIDTH, CAUSAL, WINDOW, SOFTCAP, PACKED, True, PRECISION, BLOCK_M,
            )  # fmt: skip
    to = (batch.to(tl.int64) * keys * kv_heads + kv_head) * DIM
    angles = batch.to(tl.int64) * angle_batch
    # dV leaves first: while dK is turned, its registers are needed for the angles.
    store_columns(grad_v + to, dv, start, local, exists, kv_heads * DIM, 0, MAIN, DIM, 0, False)
    if TAIL > 0:
        store_columns(grad_v + to, dv_tail, start, local, exists, kv_heads * DIM, MAIN, TAIL, DIM, 0, False)
        dk_tail = dk_tail * out_scale
        if 2 * ROTARY > MAIN:
            dk_tail = turn(dk_tail, cos + angles, sin + angles, angle_first + start, local, exists, MAIN, ROTARY, -1.0)
        store_columns(grad_k + to, dk_tail, start, local, exists, kv_heads * DIM, MAIN, TAIL, DIM, ROTARY, INTERLEAVED)
    dk = dk * out_scale
    if ROTARY > 0:
        dk = turn(dk, cos + angles, sin + angles, angle_first + start, local, exists, 0, ROTARY, -1.0)
    store_columns(grad_k + to, dk, start, local, exists, kv_heads * DIM, 0, MAIN, DIM, ROTARY, INTERLEAVED)
