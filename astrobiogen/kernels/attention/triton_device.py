"""Device functions that the attention kernels share: columns and their rotation, visible key ranges, scores.

A head of DIM columns is cut into MAIN + TAIL, a power of two and the rest rounded up to a power of two >= 16 (68 = 64
+ 16): a dot over 80 columns instead of 128. Q and K are taken in an internal column order, which leaves q . k as it is:
the first members of MAIN / 2 rotary pairs, then their partners, then the tail with partners side by side (68,
rotate-half: 0-31, 34-65, then 32, 66, 33, 67). The halves are loaded as two contiguous tiles and rotated against each
other without moving a number between lanes. (Joining them to one tile would halve the width at which Triton reads the
operand of the dot from shared memory: LDS instead of LDSM.)

Strides come in units of UNIT elements, the largest power of two up to 16 bytes that divides them: the compiler sees how
wide it may load.
"""

import triton
import triton.language as tl

# Integers of which no code depends on whether 16 divides them: strides come in units that are compiled in.
SIZES = [f"{tensor}_{axis}" for tensor in "xqkvgo" for axis in ("batch", "token", "head")]
SIZES += ["heads", "group", "tokens", "queries", "keys", "angle_first", "key_first", "chunk", "splits", "window"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def half_columns(SIDE: tl.constexpr, MAIN: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Memory columns of the first (SIDE 0) or second (SIDE 1) members of the MAIN / 2 pairs. Columns that do not rotate
    fill up both sides.
    """
    PAIRS: tl.constexpr = MAIN // 2
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        return 2 * pair + SIDE
    if ROTARY >= PAIRS:
        return pair + SIDE * ROTARY
    return tl.where(pair < ROTARY, pair + SIDE * ROTARY, pair + (SIDE * PAIRS + (1 - SIDE) * ROTARY))


@triton.jit
def tail_columns(MAIN: tl.constexpr, TAIL: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Memory columns of the tail: the pairs from MAIN / 2 on, partners side by side, then what does not rotate."""
    column = tl.arange(0, TAIL)
    if 2 * ROTARY > MAIN and not INTERLEAVED:
        pair = MAIN // 2 + column // 2
        return tl.where(pair < ROTARY, pair + (column % 2) * ROTARY, MAIN + column)
    return MAIN + column


@triton.jit
def row_pointers(base, first, local, stride, UNIT: tl.constexpr):
    """Pointers [rows, 1] to rows first + local: a 64-bit start and 32-bit offsets inside the tile, which cost half
    the registers of 64-bit ones.
    """
    return base + tl.cast(first, tl.int64) * stride * UNIT + (local * stride)[:, None] * UNIT


@triton.jit
def load_part(
    rows, live, START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """A [rows, COUNT] tile at column START of rows that have WIDTH readable columns; zero elsewhere. Without MASKED
    every row exists.
    """
    column = START + tl.arange(0, COUNT)
    pointer = rows + column[None, :]
    if START + COUNT <= WIDTH:
        if MASKED:
            return tl.load(pointer, mask=live[:, None], other=0.0)
        return tl.load(pointer)
    if MASKED:
        return tl.load(pointer, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tl.load(pointer, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_columns(rows, live, column, DIM: tl.constexpr):
    """The memory columns `column` of rows with DIM columns; zero outside."""
    return tl.load(rows + column[None, :], mask=live[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store_columns(rows, value, live, column, DIM: tl.constexpr):
    """The reverse of `load_columns`."""
    tl.store(rows + column[None, :], value.to(rows.dtype.element_ty), mask=live[:, None] & (column < DIM)[None, :])


@triton.jit
def store_rounded(rows, rest, value, live, column, DIM: tl.constexpr, REST: tl.constexpr):
    """`store_columns`, and with REST in half precision what rounding took away (`reference.remainder`), at the same
    places of `rest`.
    """
    store_columns(rows, value, live, column, DIM)
    if REST and rest.dtype.element_ty == tl.int16:
        rounded = value.to(rows.dtype.element_ty).to(tl.float32)
        difference = value.to(tl.int32, bitcast=True) - rounded.to(tl.int32, bitcast=True)
        difference = tl.minimum(tl.maximum(difference, -32768), 32767)
        store_columns(rest, tl.where(finite(rounded), difference, 0), live, column, DIM)


@triton.jit
def log_sum_of(top, total):
    """(log-sum-exp, its correction as `reference.correction`) of an online softmax; `top` in units of log 2."""
    blind = total == 0.0
    sum_ = tl.where(blind, 1.0, total)
    value = tl.where(blind, float("-inf"), (top + tl.log2(sum_)) * LN2)
    correction = tl.exp2(tl.fma(value, LOG2E, -top)) / sum_
    return value, tl.where(finite(correction), correction, 1.0)


@triton.jit
def finite(x):
    """True where x is neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def only_finite(x):
    """x with 0 in place of what is not finite: beside a hidden pair's weight of 0 that would become NaN."""
    return tl.where(finite(x), x, 0.0).to(x.dtype)


@triton.jit
def clamped(x, LARGEST: tl.constexpr):
    """x with 0 for NaN and the largest number for an infinity, which keeps its sign in a score."""
    value = x.to(tl.float32)
    value = tl.where(value == value, tl.minimum(tl.maximum(value, -LARGEST), LARGEST), 0.0)
    return value.to(x.dtype)


@triton.jit
def load_angles(rows, live, START: tl.constexpr, PAIRS: tl.constexpr, ROTARY: tl.constexpr, OTHER: tl.constexpr):
    """cos or sin [rows, PAIRS] of the pairs START ..; OTHER for pairs that do not rotate."""
    pair = START + tl.arange(0, PAIRS)
    if START + PAIRS <= ROTARY:
        return tl.load(rows + pair[None, :], mask=live[:, None], other=OTHER)
    return tl.load(rows + pair[None, :], mask=live[:, None] & (pair < ROTARY)[None, :], other=OTHER)


@triton.jit
def load_rotated(
    rows, cos, sin, live, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both halves and the tail of rows in the internal order, rotated in fp32 and rounded back. cos, sin: pointers
    [rows, 1]. Without a tail the first half is returned in its place.
    """
    PAIRS: tl.constexpr = MAIN // 2
    dtype = rows.dtype.element_ty
    a = load_columns(rows, live, half_columns(0, MAIN, ROTARY, INTERLEAVED), DIM)
    b = load_columns(rows, live, half_columns(1, MAIN, ROTARY, INTERLEAVED), DIM)
    if ROTARY > 0:
        c, s = load_angles(cos, live, 0, PAIRS, ROTARY, 1.0), load_angles(sin, live, 0, PAIRS, ROTARY, 0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        a, b = (x * c - y * s).to(dtype), (x * s + y * c).to(dtype)
    tail = a
    if TAIL > 0:
        column = tail_columns(MAIN, TAIL, ROTARY, INTERLEAVED)
        tail = load_columns(rows, live, column, DIM)
        if 2 * ROTARY > MAIN:
            # Every column with its partner, loaded once more: no exchange between lanes.
            local = tl.arange(0, TAIL)
            rotates = MAIN // 2 + local // 2 < ROTARY
            if INTERLEAVED:
                partner = MAIN + (local ^ 1)
            else:
                partner = tl.where(rotates, column + tl.where(local % 2 == 0, ROTARY, -ROTARY), column)
            angle = MAIN // 2 + local // 2
            mask = live[:, None] & rotates[None, :]
            c = tl.load(cos + angle[None, :], mask=mask, other=1.0)
            s = tl.load(sin + angle[None, :], mask=mask, other=0.0) * tl.where(local % 2 == 0, -1.0, 1.0)[None, :]
            other = load_columns(rows, live, partner, DIM)
            tail = (tail.to(tl.float32) * c + other.to(tl.float32) * s).to(dtype)
    return a, b, tail


@triton.jit
def store_turned_back(
    rows, main, tail, cos, sin, live, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the gradient [rows, MAIN] and [rows, TAIL], both in the internal order, backwards and store it in memory
    order.
    """
    ROWS: tl.constexpr = main.shape[0]
    PAIRS: tl.constexpr = MAIN // 2
    if TAIL > 0:
        if 2 * ROTARY > MAIN:
            START: tl.constexpr = MAIN // 2
            x, y = tl.split(tl.reshape(tail, [ROWS, TAIL // 2, 2]))
            c = load_angles(cos, live, START, TAIL // 2, ROTARY, 1.0)
            s = load_angles(sin, live, START, TAIL // 2, ROTARY, 0.0)
            tail = tl.reshape(tl.join(x * c + y * s, y * c - x * s), [ROWS, TAIL])
        store_columns(rows, tail, live, tail_columns(MAIN, TAIL, ROTARY, INTERLEAVED), DIM)
    a, b = tl.split(tl.permute(tl.reshape(main, [ROWS, 2, PAIRS]), (0, 2, 1)))
    if ROTARY > 0:
        c, s = load_angles(cos, live, 0, PAIRS, ROTARY, 1.0), load_angles(sin, live, 0, PAIRS, ROTARY, 0.0)
        a, b = a * c + b * s, b * c - a * s
    store_columns(rows, a, live, half_columns(0, MAIN, ROTARY, INTERLEAVED), DIM)
    store_columns(rows, b, live, half_columns(1, MAIN, ROTARY, INTERLEAVED), DIM)


@triton.jit
def key_range(
    row, offset, keys, starts, ends, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """First and one-past-last key that query `row` (a scalar or a block of rows) sees. Both never decrease with the
    row.
    """
    position = row + offset
    low = position * 0
    high = position * 0 + keys
    if PACKED:
        low = tl.load(starts + row)
        high = tl.load(ends + row)
    if WINDOW:
        low = tl.maximum(low, position - window + 1)
        high = tl.minimum(high, position + window)
    if CAUSAL:
        high = tl.minimum(high, position + 1)
    return low, high


@triton.jit
def query_range(
    key, offset, queries, starts, ends, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr
):
    """First and one-past-last query that sees `key`."""
    row = key - offset
    low = row * 0
    high = row * 0 + queries
    if PACKED:
        low = tl.load(starts + key)
        high = tl.load(ends + key)
    if WINDOW:
        low = tl.maximum(low, row - window + 1)
        high = tl.minimum(high, row + window)
    if CAUSAL:
        low = tl.maximum(low, row)
    return low, high


@triton.jit
def tile_bounds(low, full_low, full_high, high, limit, BLOCK: tl.constexpr):
    """Cut [low, high) into tiles: [begin, clean) needs masks, [clean, edge) none, [edge, end) masks. All but `end`
    are multiples of BLOCK.
    """
    low = tl.maximum(low, 0)
    end = tl.minimum(high, limit)
    begin = low // BLOCK * BLOCK
    clean = tl.cdiv(tl.maximum(full_low, low), BLOCK) * BLOCK
    edge = tl.maximum(tl.minimum(full_high, end), 0) // BLOCK * BLOCK
    has_clean = edge > clean
    clean = tl.where(has_clean, clean, begin)
    edge = tl.where(has_clean, edge, begin)
    return begin, clean, edge, end


@triton.jit
def visible_keys(n, low, high, LOWER: tl.constexpr):
    """Mask [rows, keys] of keys n in [low, high); without LOWER every low is 0."""
    seen = n[None, :] < high[:, None]
    if LOWER:
        seen = seen & (n[None, :] >= low[:, None])
    return seen


@triton.jit
def tanh(x):
    """tanh by exp2, without overflow."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def log2_scores(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2. scale: scale * log2(e), or scale / softcap with a softcap; softcap: softcap *
    log2(e).
    """
    if SOFTCAP:
        return softcap * tanh(raw * scale)
    return raw * scale


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. "widened" serves the interpreter, whose dot takes bf16 numbers for integers; the operands
    are rounded already.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
