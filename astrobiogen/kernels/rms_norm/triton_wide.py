"""RMSNorm kernels for rows that do not fit the registers: column tiles, two walks per row. Launched by
`triton_kernels.py`."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_fwd_wide_kernel(
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
def rms_norm_bwd_wide_kernel(
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


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_weight_partial_kernel(
    grad_y_ptr, x_ptr, rstd_ptr, partial_ptr, n_rows, H: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """Weight-gradient partial of ROWS consecutive rows for one column tile, for rows wider than the registers."""
    tiles: tl.constexpr = (H + TILE - 1) // TILE
    block = (tl.program_id(0) // tiles).to(tl.int64)
    cols = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    mask = cols < H
    total = tl.zeros([TILE], dtype=tl.float32)
    for row in range(block * ROWS, tl.minimum((block + 1) * ROWS, n_rows)):
        grad = tl.load(grad_y_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        total += grad * (x * tl.load(rstd_ptr + row))
    tl.store(partial_ptr + block * H + cols, total, mask=mask)
