"""Forward kernels: repacking (with rotation), the prefill kernel, and the split-key decode kernel with its
combination.
"""

import triton
import triton.language as tl

from astrobiogen.kernels.attention.triton_device import (
    LN2,
    LOG2E,
    key_range,
    load_columns,
    log2_scores,
    product,
    store_columns,
    tile_bounds,
    tile_rows,
    turn,
)


@triton.jit
def pack_kernel(
    x, cos, sin, out,
    x_batch, x_token, x_head, tokens, heads, angle_batch, angle_first,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, heads, S, MAIN + TAIL] = x [B, S, heads, DIM], rotated, rotary pairs adjacent, zero behind DIM. Grid:
    (B heads, blocks).
    """
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    first = tl.program_id(1) * BLOCK
    local = tl.arange(0, BLOCK)
    row_mask = first + local < tokens
    base = x + batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    angles = batch.to(tl.int64) * angle_batch
    WIDTH: tl.constexpr = MAIN + TAIL
    to = tile_rows(out + tl.program_id(0).to(tl.int64) * tokens * WIDTH, first, local, WIDTH)
    part = load_columns(base, first, local, row_mask, x_token, 0, MAIN, DIM, ROTARY, INTERLEAVED)
    if ROTARY > 0:
        part = turn(part, cos + angles, sin + angles, angle_first + first, local, row_mask, 0, ROTARY, 1.0)
    tl.store(to + tl.arange(0, MAIN)[None, :], part.to(out.dtype.element_ty), mask=row_mask[:, None])
    if TAIL > 0:
        rest = load_columns(base, first, local, row_mask, x_token, MAIN, TAIL, DIM, ROTARY, INTERLEAVED)
        if 2 * ROTARY > MAIN:
            rest = turn(rest, cos + angles, sin + angles, angle_first + first, local, row_mask, MAIN, ROTARY, 1.0)
        tl.store(to + MAIN + tl.arange(0, TAIL)[None, :], rest.to(out.dtype.element_ty), mask=row_mask[:, None])


@triton.jit
def tile_columns(START: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Column numbers of a key or value tile, and which of them exist."""
    column = START + tl.arange(0, COUNT)
    return column, column < DIM


@triton.jit
def attend_tiles(
    acc, acc_tail, top, total, q, q_tail, k_base, v_base, k_token, v_token, begin, end, keys, low, high, scale, softcap,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin .. end - 1 in tiles. K_WIDTH, V_WIDTH: columns that may be read unmasked
    (DIM, or MAIN + TAIL).
    """
    columns, real = tile_columns(0, MAIN, DIM)
    tails, _real_tail = tile_columns(MAIN, TAIL if TAIL > 0 else 16, DIM)
    local = tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        n = first + local
        k_rows = k_base + tl.cast(first, tl.int64) * k_token + local[None, :] * k_token
        v_rows = tile_rows(v_base, first, local, v_token)
        exists = n < keys
        k_mask, v_mask = exists[None, :], exists[:, None]
        if MAIN > K_WIDTH:
            k_mask = k_mask & real[:, None]
        if MAIN > V_WIDTH:
            v_mask = v_mask & real[None, :]
        if MASKED or MAIN > K_WIDTH:
            k = tl.load(k_rows + columns[:, None], mask=k_mask, other=0.0)
        else:
            k = tl.load(k_rows + columns[:, None])
        raw = product(q, k, tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        if TAIL > 0:
            k_tail = tl.load(k_rows + tails[:, None], mask=exists[None, :] & ((tails < K_WIDTH)[:, None]), other=0.0)
            raw = product(q_tail, k_tail, raw, PRECISION)
        s = log2_scores(raw, scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where((n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        if MASKED or MAIN > V_WIDTH:
            v = tl.load(v_rows + columns[None, :], mask=v_mask, other=0.0)
        else:
            v = tl.load(v_rows + columns[None, :])
        p = p.to(v.dtype)
        acc = product(p, v, acc * shrink[:, None], PRECISION)
        if TAIL > 0:
            v_tail = tl.load(v_rows + tails[None, :], mask=exists[:, None] & ((tails < V_WIDTH)[None, :]), other=0.0)
            acc_tail = product(p, v_tail, acc_tail * shrink[:, None], PRECISION)
    return acc, acc_tail, top, total


@triton.jit
def forward_kernel(
    q, k, v, cos, sin, starts, ends, sinks, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    heads, group, queries, keys, angle_batch, angle_first, scale, softcap, window,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (B Hq, query blocks): neighbours share a key/value head and start with the last block, which sees the most
    keys.
    """
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first, local = block * BLOCK_M, tl.arange(0, BLOCK_M)
    m = first + local
    row_mask = m < queries
    q_base = q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    k_base = k + batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    v_base = v + batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    angles = batch.to(tl.int64) * angle_batch
    q_main = load_columns(q_base, first, local, row_mask, q_token, 0, MAIN, DIM, ROTARY, INTERLEAVED)
    if ROTARY > 0:
        q_main = turn(q_main, cos + angles, sin + angles, angle_first + first, local, row_mask, 0, ROTARY, 1.0).to(
            q.dtype.element_ty
        )
    q_tail = q_main
    acc_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    if TAIL > 0:
        q_tail = load_columns(q_base, first, local, row_mask, q_token, MAIN, TAIL, DIM, ROTARY, INTERLEAVED)
        if 2 * ROTARY > MAIN:
            q_tail = turn(
                q_tail, cos + angles, sin + angles, angle_first + first, local, row_mask, MAIN, ROTARY, 1.0
            ).to(q.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.where(top == float("-inf"), 0.0, total + 1.0)
    offset = keys - queries
    seen = tl.minimum(m, queries - 1)
    low, high = key_range(seen, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    last = tl.minimum(first + BLOCK_M, queries) - 1
    low_first, high_first = key_range(first, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    low_last, high_last = key_range(last, offset, keys, starts, ends, window, CAUSAL, WINDOW, PACKED)
    begin, clean, edge, end = tile_bounds(low_first, low_last, high_first, high_last, keys, BLOCK_N)
    if WINDOW or PACKED:
        acc, acc_tail, top, total = attend_tiles(
            acc, acc_tail, top, total, q_main, q_tail, k_base, v_base, k_token, v_token, begin, clean, keys, low,
            high, scale, softcap,
            DIM, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    acc, acc_tail, top, total = attend_tiles(
        acc, acc_tail, top, total, q_main, q_tail, k_base, v_base, k_token, v_token, clean, edge, keys, low, high,
        scale, softcap,
        DIM, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, False, PRECISION, BLOCK_N,
    )  # fmt: skip
    acc, acc_tail, top, total = attend_tiles(
        acc, acc_tail, top, total, q_main, q_tail, k_base, v_base, k_token, v_token, edge, end, keys, low, high,
        scale, softcap,
        DIM, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    blind = total == 0.0
    inverse = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    out_base = out + (batch.to(tl.int64) * queries * heads + head) * DIM
    store_columns(out_base, acc * inverse[:, None], first, local, row_mask, heads * DIM, 0, MAIN, DIM, 0, False)
    if TAIL > 0:
        store_columns(
            out_base, acc_tail * inverse[:, None], first, local, row_mask, heads * DIM, MAIN, TAIL, DIM, 0, False
        )
    value = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    tl.store(lse + tl.program_id(0).to(tl.int64) * queries + m, value, mask=row_mask)


@triton.jit
def decode_kernel(
    q, k, v, cos, sin, partial, partial_top, partial_total,
    q_batch, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    kv_heads, group, keys, low, angle_batch, angle_first, chunk, scale, softcap,
    DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query token: the group's heads fill the rows of the dot, the keys low .. keys - 1 are cut into chunks. Grid
    (B Hkv, head blocks, chunks).
    """
    batch, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    row_mask = g < group
    split = tl.program_id(2)
    q_base = q + batch.to(tl.int64) * q_batch + (kv_head * group).to(tl.int64) * q_head
    k_base = k + batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v + batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    angles = batch.to(tl.int64) * angle_batch
    q_main = load_columns(q_base, 0, g, row_mask, q_head, 0, MAIN, DIM, ROTARY, INTERLEAVED)
    if ROTARY > 0:
        q_main = turn(q_main, cos + angles, sin + angles, angle_first, g * 0, row_mask, 0, ROTARY, 1.0).to(
            q.dtype.element_ty
        )
    q_tail = q_main
    if TAIL > 0:
        q_tail = load_columns(q_base, 0, g, row_mask, q_head, MAIN, TAIL, DIM, ROTARY, INTERLEAVED)
        if 2 * ROTARY > MAIN:
            q_tail = turn(q_tail, cos + angles, sin + angles, angle_first, g * 0, row_mask, MAIN, ROTARY, 1.0).to(
                q.dtype.element_ty
            )
    acc = tl.zeros([BLOCK_G, MAIN], tl.float32)
    acc_tail = tl.zeros([BLOCK_G, TAIL if TAIL > 0 else 16], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    begin = low + split * chunk
    end = tl.minimum(begin + chunk, keys)
    acc, acc_tail, top, total = attend_tiles(
        acc, acc_tail, top, total, q_main, q_tail, k_base, v_base, k_token, v_token, begin, end, keys, g * 0 + begin,
        g * 0 + end,
        scale, softcap, DIM, MAIN, TAIL, K_WIDTH, V_WIDTH, SOFTCAP, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * group + g) * tl.num_programs(2) + split
    to = partial + row[:, None] * (MAIN + TAIL)
    tl.store(to + tl.arange(0, MAIN)[None, :], acc, mask=row_mask[:, None])
    if TAIL > 0:
        tl.store(to + MAIN + tl.arange(0, TAIL)[None, :], acc_tail, mask=row_mask[:, None])
    tl.store(partial_top + row, top, mask=row_mask)
    tl.store(partial_total + row, total, mask=row_mask)


@triton.jit
def combine_kernel(
    partial, partial_top, partial_total, sinks, out, lse, heads, splits,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one (batch, head) in their order. Grid (B Hq,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    top = float("-inf")
    if SINKS:
        top = tl.load(sinks + row % heads).to(tl.float32) * LOG2E
    for split in range(splits):
        top = tl.maximum(top, tl.load(partial_top + row * splits + split))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = safe * 0.0
    if SINKS:
        total += tl.exp2(tl.load(sinks + row % heads).to(tl.float32) * LOG2E - safe)
    acc = tl.zeros([COLUMNS], tl.float32)
    for split in range(splits):
        index = row * splits + split
        weight = tl.exp2(tl.load(partial_top + index) - safe)
        total += weight * tl.load(partial_total + index)
        acc += weight * tl.load(partial + index * WIDTH + column, mask=column < WIDTH, other=0.0)
    blind = total == 0.0
    result = tl.where(blind, 0.0, acc / tl.where(blind, 1.0, total))
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty), mask=column < DIM)
    tl.store(lse + row, tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2))
