"""Device functions that the attention kernels share: columns and their rotation, visible key ranges, scores.

A head of DIM columns is cut into MAIN + TAIL, a power of two and the rest rounded up to a power of two >= 16 (68 = 64
+ 16): a dot over 80
columns instead of 128. Inside the kernels rotary pairs stand next to each other (the order of the interleaved
convention): q . k does not
change under a common permutation, and a rotation is then a reshape and a split inside one thread, across the cut of
MAIN and TAIL too.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def outer_columns(START: tl.constexpr, COUNT: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Memory columns of the internal columns START .. START + COUNT - 1."""
    column = START + tl.arange(0, COUNT)
    if ROTARY > 0 and not INTERLEAVED:
        return tl.where(column < 2 * ROTARY, column // 2 + (column % 2) * ROTARY, column)
    return column


@triton.jit
def tile_rows(base, first, local, stride):
    """Pointers [rows, 1] to rows first + local: a 64-bit start and 32-bit offsets inside the tile, which cost half
    the registers of 64-bit ones.
    """
    return base + tl.cast(first, tl.int64) * stride + local[:, None] * stride


@triton.jit
def load_columns(
    base,
    first,
    local,
    row_mask,
    stride,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Internal columns START .. START + COUNT of rows first + local of [rows, DIM]; zero outside."""
    column = outer_columns(START, COUNT, ROTARY, INTERLEAVED)
    mask = row_mask[:, None] & (column < DIM)[None, :]
    return tl.load(tile_rows(base, first, local, stride) + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(
    base,
    value,
    first,
    local,
    row_mask,
    stride,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The reverse of `load_columns`."""
    column = outer_columns(START, COUNT, ROTARY, INTERLEAVED)
    mask = row_mask[:, None] & (column < DIM)[None, :]
    pointer = tile_rows(base, first, local, stride) + column[None, :]
    tl.store(pointer, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def turn(x, cos, sin, first, local, row_mask, START: tl.constexpr, ROTARY: tl.constexpr, SIGN: tl.constexpr):
    """Rotate the internal columns START .. of x [rows, columns] in fp32; cos, sin [.., ROTARY] in fp32, rows first +
    local.
    """
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    pair = START // 2 + tl.arange(0, PAIRS)
    cos = tile_rows(cos, first, local, ROTARY)
    sin = tile_rows(sin, first, local, ROTARY)
    mask = row_mask[:, None] & (pair < ROTARY)[None, :]
    c = tl.load(cos + pair[None, :], mask=mask, other=1.0)
    s = tl.load(sin + pair[None, :], mask=mask, other=0.0) * SIGN
    a, b = tl.split(tl.reshape(x.to(tl.float32), [ROWS, PAIRS, 2]))
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), [ROWS, 2 * PAIRS])


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
