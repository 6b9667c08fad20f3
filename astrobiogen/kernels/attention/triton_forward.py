"""Forward kernels: repacking (with rotation), attention of query blocks, and the merge of split keys."""

import triton
import triton.language as tl

from astrobiogen.kernels.attention.triton_device import (
    LOG2E,
    SIZES,
    clamped,
    finite,
    key_range,
    load_part,
    load_rotated,
    log2_scores,
    log_sum_of,
    only_finite,
    product,
    row_pointers,
    store_columns,
    store_rounded,
    tile_bounds,
    visible_keys,
)


@triton.jit(do_not_specialize_on_alignment=SIZES)
def pack_kernel(
    x, cos, sin, factors, out,
    x_batch, x_token, x_head, tokens, heads, padded, angle_batch, angle_first,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, X_UNIT: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, FACTORS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, heads, S, MAIN + TAIL] = x [B, S, heads, DIM], rotated, in the internal column order, zero behind DIM;
    with FACTORS times `factors` [B, heads, padded]; made finite with LARGEST > 0, the dtype's largest number. Program
    p: rows of block p // (B heads).
    """
    pairs = tl.num_programs(0) // tl.cdiv(tokens, BLOCK)
    pair = tl.program_id(0) % pairs
    batch, head = pair // heads, pair % heads
    first, local = tl.program_id(0) // pairs * BLOCK, tl.arange(0, BLOCK)
    live = first + local < tokens
    base = x + (batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head) * X_UNIT
    rows = row_pointers(base, first, local, x_token, X_UNIT)
    angles = batch.to(tl.int64) * angle_batch
    a, b, tail = load_rotated(
        rows, row_pointers(cos + angles, angle_first + first, local, ROTARY, 1),
        row_pointers(sin + angles, angle_first + first, local, ROTARY, 1), live, DIM, MAIN, TAIL, ROTARY, INTERLEAVED,
    )  # fmt: skip
    if FACTORS:
        factor = tl.load(factors + pair.to(tl.int64) * padded + first + local)[:, None]
        a, b, tail = a * factor, b * factor, tail * factor
    if LARGEST > 0:
        a, b, tail = clamped(a, LARGEST), clamped(b, LARGEST), clamped(tail, LARGEST)
    WIDTH: tl.constexpr = MAIN + TAIL
    to = row_pointers(out + pair.to(tl.int64) * tokens * WIDTH, first, local, 1, WIDTH)
    half = tl.arange(0, MAIN // 2)[None, :]
    tl.store(to + half, a, mask=live[:, None])
    tl.store(to + (MAIN // 2) + half, b, mask=live[:, None])
    if TAIL > 0:
        tl.store(to + MAIN + tl.arange(0, TAIL)[None, :], tail, mask=live[:, None])


@triton.jit
def attend_tiles(
    acc, acc_tail, top, total, silenced, q_a, q_b, q_tail, k_base, v_base, k_token, v_token, begin, end, keys, low,
    high, scale, softcap,
    MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, LOWER: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin .. end - 1 in tiles. `top` is the running maximum in units of log 2. Masked
    tiles take values that are not finite for 0 and mark them in `silenced` [BLOCK_N]: `hear` adds them.
    """
    HALF: tl.constexpr = MAIN // 2
    local = tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        n = first + local
        exists = n < keys
        k_rows = row_pointers(k_base, first, local, k_token, K_UNIT)
        v_rows = row_pointers(v_base, first, local, v_token, V_UNIT)
        raw = tl.zeros([q_a.shape[0], BLOCK_N], tl.float32)
        raw = product(q_a, tl.trans(load_part(k_rows, exists, 0, HALF, K_WIDTH, MASKED)), raw, PRECISION)
        raw = product(q_b, tl.trans(load_part(k_rows, exists, HALF, HALF, K_WIDTH, MASKED)), raw, PRECISION)
        if TAIL > 0:
            raw = product(q_tail, tl.trans(load_part(k_rows, exists, MAIN, TAIL, K_WIDTH, MASKED)), raw, PRECISION)
        s = log2_scores(raw, scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where(visible_keys(n, low, high, LOWER), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        v = load_part(v_rows, exists, 0, MAIN, V_WIDTH, MASKED)
        if MASKED:
            silenced = tl.maximum(silenced, tl.max(tl.where(finite(v), 0, 1), 1))
            v = only_finite(v)
        p = p.to(v.dtype)
        acc = product(p, v, acc * shrink[:, None], PRECISION)
        if TAIL > 0:
            v_tail = load_part(v_rows, exists, MAIN, TAIL, V_WIDTH, MASKED)
            if MASKED:
                silenced = tl.maximum(silenced, tl.max(tl.where(finite(v_tail), 0, 1), 1))
                v_tail = only_finite(v_tail)
            acc_tail = product(p, v_tail, acc_tail * shrink[:, None], PRECISION)
    return acc, acc_tail, top, total, silenced


@triton.jit
def hear(acc, v_base, v_token, begin, end, low, high, column, V_WIDTH: tl.constexpr, V_UNIT: tl.constexpr):
    """Add the columns `column` of values that are not finite, of the keys begin .. end - 1, to the rows that see them.
    One key after the other: this runs only where there are any.
    """
    for n in range(begin, end):
        row = v_base + tl.cast(n, tl.int64) * v_token * V_UNIT + column
        value = tl.load(row, mask=column < V_WIDTH, other=0.0).to(tl.float32)
        loud = tl.where(finite(value), 0.0, value)
        seen = (low <= n) & (n < high)
        acc += tl.where(seen[:, None], loud[None, :], 0.0)
    return acc


@triton.jit
def forward_kernel(
    q, k, v, cos, sin, starts, ends, sinks, out, lse, totals, rest,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    heads, group, queries, keys, angle_batch, angle_first, key_first, chunk, scale, softcap, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
    HEADS: tl.constexpr, SPLIT: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of query rows against the keys they see. The rows of a program are tokens times HEADS heads that share
    a key/value head, head fastest: 1, or the whole group where there are few tokens. Q is rotated here; k is rotated
    and in the internal order already.

    Grid (B heads / HEADS, row blocks, splits), longest blocks first: neighbouring programs share keys in the cache.
    With SPLIT a program takes the keys key_first + split * chunk .. and leaves unnormalised fp32 rows [B, Hq, Sq,
    splits, MAIN + TAIL] in `out`, their maxima in `lse` and sums in `totals`.
    """
    units = heads // HEADS
    batch, head = tl.program_id(0) // units, tl.program_id(0) % units * HEADS
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, local = block * BLOCK_M, tl.arange(0, BLOCK_M)
    first_token = first // HEADS
    token, head_local = (first + local) // HEADS, (first + local) % HEADS
    live = first + local < queries * HEADS
    q_base = q + (batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head) * Q_UNIT
    q_rows = (
        row_pointers(q_base, first_token, token - first_token, q_token, Q_UNIT)
        + (head_local * q_head)[:, None] * Q_UNIT
    )
    k_base = k + (batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head) * K_UNIT
    v_base = v + (batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head) * V_UNIT
    angles = batch.to(tl.int64) * angle_batch
    q_a, q_b, q_tail = load_rotated(
        q_rows, row_pointers(cos + angles, angle_first + first_token, token - first_token, ROTARY, 1),
        row_pointers(sin + angles, angle_first + first_token, token - first_token, ROTARY, 1), live,
        DIM, MAIN, TAIL, ROTARY, INTERLEAVED,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    silenced = tl.zeros([BLOCK_N], tl.int32)
    if SINKS and not SPLIT:
        top = tl.load(sinks + head + head_local).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    offset = keys - queries
    low, high = key_range(tl.minimum(token, queries - 1), offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    last = tl.minimum((first + BLOCK_M - 1) // HEADS, queries - 1)
    low_first, high_first = key_range(first_token, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = key_range(last, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin, clean, edge, end = tile_bounds(low_first, low_last, high_first, high_last, keys, BLOCK_N)
    if SPLIT:
        chunk_first = key_first + tl.program_id(2) * chunk
        begin = tl.minimum(tl.maximum(begin, chunk_first), chunk_first + chunk)
        clean = tl.minimum(tl.maximum(clean, chunk_first), chunk_first + chunk)
        edge = tl.minimum(tl.maximum(edge, chunk_first), chunk_first + chunk)
        end = tl.minimum(tl.maximum(end, chunk_first), chunk_first + chunk)
    LOWER: tl.constexpr = WINDOW or PACKED
    if LOWER:
        acc, acc_tail, top, total, silenced = attend_tiles(
            acc, acc_tail, top, total, silenced, q_a, q_b, q_tail, k_base, v_base, k_token, v_token, begin, clean, keys,
            low, high, scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, SOFTCAP, True, True, PRECISION,
            BLOCK_N,
        )  # fmt: skip
    acc, acc_tail, top, total, silenced = attend_tiles(
        acc, acc_tail, top, total, silenced, q_a, q_b, q_tail, k_base, v_base, k_token, v_token, clean, edge, keys, low,
        high, scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, SOFTCAP, LOWER, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    acc, acc_tail, top, total, silenced = attend_tiles(
        acc, acc_tail, top, total, silenced, q_a, q_b, q_tail, k_base, v_base, k_token, v_token, edge, end, keys, low,
        high, scale, softcap, MAIN, TAIL, K_WIDTH, V_WIDTH, K_UNIT, V_UNIT, SOFTCAP, LOWER, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    row = (batch * heads + head + head_local).to(tl.int64) * queries + token
    columns, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL if TAIL > 0 else 16)
    if tl.max(silenced, 0) > 0:
        acc = hear(acc, v_base, v_token, begin, end, low, high, columns, V_WIDTH, V_UNIT)
        if TAIL > 0:
            acc_tail = hear(acc_tail, v_base, v_token, begin, end, low, high, tails, V_WIDTH, V_UNIT)
    if SPLIT:
        row = row * tl.num_programs(2) + tl.program_id(2)
        to = out + row[:, None] * (MAIN + TAIL)
        tl.store(lse + row, top, mask=live)
        tl.store(totals + row, total, mask=live)
        store_columns(to, acc, live, columns, MAIN)
        if TAIL > 0:
            store_columns(to, acc_tail, live, tails, MAIN + TAIL)
    else:
        blind = total == 0.0
        inverse = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))[:, None]
        sees = (low < high)[:, None]  # a row that sees nothing is 0, also where its sink is not finite
        base = (batch.to(tl.int64) * queries * heads + head) * DIM
        to = row_pointers(out + base, first_token, token - first_token, heads, DIM) + head_local[:, None] * DIM
        left = row_pointers(rest + base, first_token, token - first_token, heads, DIM) + head_local[:, None] * DIM
        store_rounded(to, left, tl.where(sees, acc * inverse, 0.0), live, columns, DIM, REST)
        if TAIL > 0:
            store_rounded(to, left, tl.where(sees, acc_tail * inverse, 0.0), live, tails, DIM, REST)
        value, correction = log_sum_of(top, total)
        tl.store(lse + row, value, mask=live)
        if REST and rest.dtype.element_ty == tl.float32:
            tl.store(rest + row, correction, mask=live)


@triton.jit
def combine_kernel(
    partial, tops, totals, sinks, out, lse, rest, heads, queries, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SINKS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row [B, Hq, Sq] in their order. Grid (B Hq Sq,)."""
    row = tl.program_id(0).to(tl.int64)
    head = row // queries % heads
    column = tl.arange(0, COLUMNS)
    seen = float("-inf")
    for split in range(splits):
        seen = tl.maximum(seen, tl.load(tops + row * splits + split))
    top = seen
    if SINKS:
        top = tl.maximum(seen, tl.load(sinks + head).to(tl.float32) * LOG2E)
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = safe * 0.0
    if SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - safe)
    acc = tl.zeros([COLUMNS], tl.float32)
    for split in range(splits):
        index = row * splits + split
        weight = tl.exp2(tl.load(tops + index) - safe)
        total += weight * tl.load(totals + index)
        acc += weight * tl.load(partial + index * WIDTH + column, mask=column < WIDTH, other=0.0)
    blind = total == 0.0
    result = tl.where(blind | (seen == float("-inf")), 0.0, acc / tl.where(blind, 1.0, total))
    to = (((row // (heads * queries)) * queries + row % queries) * heads + head) * DIM
    row_of_one = tl.zeros([1, 1], tl.int64) + to
    store_rounded(out + row_of_one, rest + row_of_one, result[None, :], tl.full([1], True, tl.int1), column, DIM, REST)
    value, correction = log_sum_of(top, total)
    tl.store(lse + row, value)
    if REST and rest.dtype.element_ty == tl.float32:
        tl.store(rest + row, correction)
