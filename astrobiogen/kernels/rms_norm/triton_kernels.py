"""RMSNorm on NVIDIA GPUs, forward and backward, with the residual addition fused. Formulas: `reference.py`; bytes and floors: `README.md`.

A row of H columns is held in registers as at most three power-of-two tiles, e.g. 4352 = 4096 + 256, instead of one tile of 8192 with 47 % of
its lanes masked; only the last tile may carry a mask (67 = 64 + 4 with 3 live columns). Rows wider than `MAX_ROW` are walked in column tiles.

Backward: program p of a fixed grid takes rows p, p + P, p + 2P, ... and keeps its share of the weight gradient in fp32 registers; one more
kernel adds the P partials in order. Nothing is atomic, so a repeated run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from astrobiogen.kernels._case import CompileCase

# Columns held in registers: 16384 fp32 over 16 warps are 32 registers per tensor and thread; twice that spills in the backward.
MAX_ROW = 16384
# Column tile for wider rows: 4096 fp32 over 8 warps are 16 registers per thread.
WIDE_TILE = 4096
# Narrow rows are batched until a program holds about this many elements, enough to fill 4 warps with 16-byte loads.
ELEMENTS_PER_PROGRAM = 2048
# Backward programs per multiprocessor: two rows of x and grad_y in flight cover the ~29 KB per SM that an H100-class memory needs, and
# the fp32 partials stay at 2 x 132 x 4352 x 4 B = 4.6 MB beside the 53.5 MB that 2048 rows move.
BACKWARD_PROGRAMS_PER_SM = 2
# Rows per program in the wide weight-gradient kernel.
WIDE_ROWS = 64


@triton.jit
def _load_tile(pointer, rows, row_mask, START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr):
    """Tile [R, COLS] in fp32 from columns START.. of contiguous rows of length H; rows and columns outside give 0."""
    cols = START + tl.arange(0, COLS)
    offsets = rows[:, None] * H + cols[None, :]
    if START + COLS <= H:
        return tl.load(pointer + offsets, mask=row_mask[:, None], other=0.0).to(tl.float32)
    return tl.load(pointer + offsets, mask=row_mask[:, None] & (cols < H)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(pointer, tile, rows, row_mask, START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr):
    cols = START + tl.arange(0, COLS)
    offsets = rows[:, None] * H + cols[None, :]
    value = tile.to(pointer.dtype.element_ty)
    if START + COLS <= H:
        tl.store(pointer + offsets, value, mask=row_mask[:, None])
    else:
        tl.store(pointer + offsets, value, mask=row_mask[:, None] & (cols < H)[None, :])


@triton.jit
def _load_weight(pointer, START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr):
    """Weight tile [1, COLS] in fp32; columns past H give 0."""
    cols = START + tl.arange(0, COLS)
    if START + COLS <= H:
        return tl.load(pointer + cols).to(tl.float32)[None, :]
    return tl.load(pointer + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_input(
    x_ptr, residual_ptr, sum_ptr, rows, row_mask,
    START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x, or x + residual rounded to its dtype and written to sum_ptr: the norm must see the very numbers the caller gets."""
    tile = _load_tile(x_ptr, rows, row_mask, START, COLS, H)
    if ADD:
        tile += _load_tile(residual_ptr, rows, row_mask, START, COLS, H)
        tile = tile.to(sum_ptr.dtype.element_ty).to(tl.float32)
        _store_tile(sum_ptr, tile, rows, row_mask, START, COLS, H)
    return tile


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, n_rows, eps,
    H: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """R rows per program; the row lies in registers as tiles of C0, C1 and C2 columns (C1 = 0 or C2 = 0: absent)."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_mask = rows < n_rows
    x0 = _load_input(x_ptr, residual_ptr, sum_ptr, rows, row_mask, 0, C0, H, ADD)
    squares = tl.sum(x0 * x0, axis=1)
    if C1 > 0:
        x1 = _load_input(x_ptr, residual_ptr, sum_ptr, rows, row_mask, C0, C1, H, ADD)
        squares += tl.sum(x1 * x1, axis=1)
    if C2 > 0:
        x2 = _load_input(x_ptr, residual_ptr, sum_ptr, rows, row_mask, C0 + C1, C2, H, ADD)
        squares += tl.sum(x2 * x2, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / H + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    scale = rstd[:, None]
    _store_tile(y_ptr, x0 * scale * _load_weight(weight_ptr, 0, C0, H), rows, row_mask, 0, C0, H)
    if C1 > 0:
        _store_tile(y_ptr, x1 * scale * _load_weight(weight_ptr, C0, C1, H), rows, row_mask, C0, C1, H)
    if C2 > 0:
        _store_tile(y_ptr, x2 * scale * _load_weight(weight_ptr, C0 + C1, C2, H), rows, row_mask, C0 + C1, C2, H)


@triton.jit
def _rms_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, eps,
    H: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row per program in column tiles; the second walk finds the row in L2."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, H, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < H
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(residual_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * H + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / H + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, H, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < H
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:  # the sum again from its parts: what this program wrote above may not be visible to its own loads yet
            x += tl.load(residual_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * H + cols, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_sum_ptr, grad_x_ptr, partial_ptr, n_rows,
    H: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Rows pid*R, pid*R + P*R, ...: writes grad_x and this program's fp32 share of the weight gradient, [P, H]."""
    program = tl.program_id(0)
    w0 = _load_weight(weight_ptr, 0, C0, H)
    dw0 = tl.zeros([R, C0], dtype=tl.float32)
    if C1 > 0:
        w1 = _load_weight(weight_ptr, C0, C1, H)
        dw1 = tl.zeros([R, C1], dtype=tl.float32)
    if C2 > 0:
        w2 = _load_weight(weight_ptr, C0 + C1, C2, H)
        dw2 = tl.zeros([R, C2], dtype=tl.float32)
    for start in range(program * R, n_rows, tl.num_programs(0) * R):
        rows = start.to(tl.int64) + tl.arange(0, R)
        row_mask = rows < n_rows
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        n0 = _load_tile(x_ptr, rows, row_mask, 0, C0, H) * rstd
        g0 = _load_tile(grad_y_ptr, rows, row_mask, 0, C0, H)
        dw0 += g0 * n0
        g0 *= w0
        dot = tl.sum(g0 * n0, axis=1)
        if C1 > 0:
            n1 = _load_tile(x_ptr, rows, row_mask, C0, C1, H) * rstd
            g1 = _load_tile(grad_y_ptr, rows, row_mask, C0, C1, H)
            dw1 += g1 * n1
            g1 *= w1
            dot += tl.sum(g1 * n1, axis=1)
        if C2 > 0:
            n2 = _load_tile(x_ptr, rows, row_mask, C0 + C1, C2, H) * rstd
            g2 = _load_tile(grad_y_ptr, rows, row_mask, C0 + C1, C2, H)
            dw2 += g2 * n2
            g2 *= w2
            dot += tl.sum(g2 * n2, axis=1)
        mean = (dot / H)[:, None]
        _store_grad(grad_x_ptr, grad_sum_ptr, (g0 - n0 * mean) * rstd, rows, row_mask, 0, C0, H, ADD)
        if C1 > 0:
            _store_grad(grad_x_ptr, grad_sum_ptr, (g1 - n1 * mean) * rstd, rows, row_mask, C0, C1, H, ADD)
        if C2 > 0:
            _store_grad(grad_x_ptr, grad_sum_ptr, (g2 - n2 * mean) * rstd, rows, row_mask, C0 + C1, C2, H, ADD)
    _store_partial(partial_ptr, dw0, program, 0, C0, H)
    if C1 > 0:
        _store_partial(partial_ptr, dw1, program, C0, C1, H)
    if C2 > 0:
        _store_partial(partial_ptr, dw2, program, C0 + C1, C2, H)


@triton.jit
def _store_grad(
    grad_x_ptr, grad_sum_ptr, grad, rows, row_mask,
    START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    if ADD:
        grad += _load_tile(grad_sum_ptr, rows, row_mask, START, COLS, H)
    _store_tile(grad_x_ptr, grad, rows, row_mask, START, COLS, H)


@triton.jit
def _store_partial(partial_ptr, tile, program, START: tl.constexpr, COLS: tl.constexpr, H: tl.constexpr):
    cols = START + tl.arange(0, COLS)
    tl.store(partial_ptr + program.to(tl.int64) * H + cols, tl.sum(tile, axis=0), mask=cols < H)


@triton.jit
def _rms_norm_bwd_wide_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_sum_ptr, grad_x_ptr,
    H: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """grad_x of one row wider than the registers, in two walks over its column tiles."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    dots = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, H, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < H
        grad = tl.load(grad_y_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        dots += grad * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) * (x * rstd)
    mean = tl.sum(dots, axis=0) / H
    for start in range(0, H, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < H
        grad = tl.load(grad_y_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        value = (grad * weight - x * rstd * mean) * rstd
        if ADD:
            value += tl.load(grad_sum_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * H + cols, value.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_weight_partial_kernel(
    grad_y_ptr, x_ptr, rstd_ptr, partial_ptr, n_rows, H: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """Weight-gradient partial of ROWS consecutive rows for one column tile, for rows wider than the registers."""
    block = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = cols < H
    total = tl.zeros([TILE], dtype=tl.float32)
    for row in range(block * ROWS, tl.minimum((block + 1) * ROWS, n_rows)):
        grad = tl.load(grad_y_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        total += grad * (x * tl.load(rstd_ptr + row))
    tl.store(partial_ptr + block * H + cols, total, mask=mask)


@triton.jit
def _rms_norm_weight_final_kernel(
    partial_ptr, grad_weight_ptr, n_partials, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Adds the partials [n_partials, H] in a fixed order and rounds once to the weight's dtype."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < n_partials)[:, None] & (cols < H)[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * H + cols[None, :], mask=mask, other=0.0)
    value = tl.sum(total, axis=0).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + cols, value, mask=cols < H)
