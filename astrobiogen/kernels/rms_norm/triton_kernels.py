"""RMSNorm on NVIDIA GPUs, forward and backward, with the residual addition fused. Formulas: `reference.py`; bytes and
floors: `README.md`.

A row of H columns is held in registers as at most three power-of-two tiles, e.g. 4352 = 4096 + 256, instead of one tile
of 8192 with 47 % of
its lanes masked; only the last tile may carry a mask (67 = 64 + 4 with 3 live columns). Rows wider than `MAX_ROW` are
walked in column tiles
by the kernels of `triton_wide.py`.

Backward: program p of a fixed grid takes rows p, p + P, p + 2P, ... and keeps its share of the weight gradient in fp32
registers; one more
kernel adds the P partials in order. Nothing is atomic, so a repeated run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.rms_norm import reference
from astrobiogen.kernels.rms_norm.triton_wide import (
    rms_norm_bwd_wide_kernel,
    rms_norm_fwd_wide_kernel,
    rms_norm_weight_partial_kernel,
)
from astrobiogen.kernels.triton_launch import launch, multiprocessors

# Columns held in registers: 16384 fp32 over 16 warps are 32 registers per tensor and thread; twice that spills in the
# backward.
MAX_ROW = 16384
# Column tile for wider rows: 4096 fp32 over 8 warps are 16 registers per thread.
WIDE_TILE = 4096
# Narrow rows are batched until a program holds about this many elements, enough to fill 4 warps with 16-byte loads.
ELEMENTS_PER_PROGRAM = 2048
# Backward programs per multiprocessor: two rows of x and grad_y in flight cover what an H100-class memory needs, and
# the fp32 partials stay below a tenth of the bytes that the rows move.
BACKWARD_PROGRAMS_PER_SM = 2
# Steps of a backward program at most: the rounding error of a sum in fp32 grows with the length of its chain. More
# programs than are resident share a multiprocessor one after the other, at 8 bytes of partials per 128 rows and column
# beside the 768 of x, grad_y and grad_x in half precision.
MOST_STEPS = 128
# Partials that the final kernel adds up, in chains of 64; from more of them on PyTorch's sum serves, which is pairwise.
MOST_PARTIALS = 1024
# Rows per program in the wide weight-gradient kernel.
WIDE_ROWS = 64
# Strip of the final reduction: 128 fp32 columns are one 512-byte line per row, and 16 rows keep 4 warps busy with 16
# values each.
FINAL_ROWS, FINAL_COLS = 16, 128
# Widths that the ahead-of-time gate compiles: the flagship 4352 and the usual 2048, 4096, 5120.
BENCHMARK_HIDDEN = (2048, 4096, 4352, 5120)


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
    """x, or x + residual rounded to its dtype and written to sum_ptr: the norm must see the very numbers the caller
    gets."""
    tile = _load_tile(x_ptr, rows, row_mask, START, COLS, H)
    if ADD:
        tile += _load_tile(residual_ptr, rows, row_mask, START, COLS, H)
        tile = tile.to(sum_ptr.dtype.element_ty).to(tl.float32)
        _store_tile(sum_ptr, tile, rows, row_mask, START, COLS, H)
    return tile


@triton.jit(do_not_specialize=["n_rows"])
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


@triton.jit(do_not_specialize=["n_rows"])
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
        rows = start + tl.arange(0, R).to(tl.int64)
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


@triton.jit(do_not_specialize=["n_partials"])
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


def column_tiles(hidden: int) -> tuple[int, int, int]:
    """Power-of-two tiles (C0, C1, C2) that cover `hidden` columns; C1 and C2 may be 0.

    The binary expansion of `hidden` where it has at most three terms of 16 or more (4352 = 4096 + 256, 5120 = 4096 +
    1024), so that no
    tile needs a column mask; otherwise the last tile is rounded up and masked (11605 = 8192 + 2048 + 2048 with 1365
    live columns).
    """
    tiles: list[int] = []
    rest = hidden
    while rest > 0 and len(tiles) < 3:
        power = 1 << (rest.bit_length() - 1)
        last = len(tiles) == 2 or rest < 16
        tile = triton.next_power_of_2(rest) if last else power
        tiles.append(tile)
        rest -= tile
    first, second, third = [*tiles, 0, 0][:3]
    return first, second, third


def rows_per_program(hidden: int) -> int:
    """Rows that one forward or backward program holds at once."""
    return max(1, ELEMENTS_PER_PROGRAM // triton.next_power_of_2(hidden))


def forward_warps(hidden: int) -> int:
    """Warps per forward program: about 16 elements per thread and tensor, within 4 to 16 warps."""
    return min(16, max(4, triton.next_power_of_2(hidden) // 512))


def backward_warps(hidden: int) -> int:
    """Warps per backward program: half as many, since x, grad_y, weight and its gradient are all in registers.

    At 4352 columns the compiler gives 16 warps 64 registers each and spills 8 bytes (Triton 3.7.1, sm_90); 8 warps do
    not spill.
    """
    return min(16, max(4, column_tiles(hidden)[0] // 512))


def backward_programs(n_rows: int, hidden: int, processors: int) -> int:
    """Backward programs, and so partial weight gradients, on a GPU with `processors` multiprocessors."""
    steps = triton.cdiv(n_rows, rows_per_program(hidden))
    return max(min(steps, BACKWARD_PROGRAMS_PER_SM * processors), triton.cdiv(steps, MOST_STEPS))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `rms_norm` on CUDA. fp64 runs the reference: the kernels compute in fp32."""
    if x.dtype == torch.float64:
        return reference.rms_norm_forward(x, weight, eps)
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `add_rms_norm` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.add_rms_norm_forward(x, residual, weight, eps)
    return _forward(x, residual, weight, eps)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    add = residual is not None
    residual = residual.contiguous() if residual is not None else x
    weight = weight.contiguous()
    hidden = x.shape[-1]
    y = torch.empty_like(x)
    total = torch.empty_like(x) if add else y
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    n_rows = rstd.numel()
    if n_rows == 0:
        return y, total, rstd
    if hidden > MAX_ROW:
        launch(rms_norm_fwd_wide_kernel, (n_rows,))(
            x, residual, weight, y, total, rstd, eps, H=hidden, TILE=WIDE_TILE, ADD=add, num_warps=8
        )
    else:
        c0, c1, c2 = column_tiles(hidden)
        rows = rows_per_program(hidden)
        launch(_rms_norm_fwd_kernel, (triton.cdiv(n_rows, rows),))(
            x, residual, weight, y, total, rstd, n_rows, eps,
            H=hidden, R=rows, C0=c0, C1=c1, C2=c2, ADD=add, num_warps=forward_warps(hidden),
        )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `rms_norm_backward` on CUDA. fp64 runs the reference."""
    if x.dtype == torch.float64:
        return reference.rms_norm_backward(grad_y, x, weight, rstd, grad_sum)
    grad_y, x, weight, rstd = grad_y.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    add = grad_sum is not None
    grad_sum = grad_sum.contiguous() if grad_sum is not None else grad_y
    hidden, n_rows = x.shape[-1], rstd.numel()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    if n_rows == 0:
        return grad_x, grad_weight.zero_()
    if hidden > MAX_ROW:
        partial = x.new_empty((triton.cdiv(n_rows, WIDE_ROWS), hidden), dtype=torch.float32)
        launch(rms_norm_bwd_wide_kernel, (n_rows,))(
            grad_y, x, weight, rstd, grad_sum, grad_x, H=hidden, TILE=WIDE_TILE, ADD=add, num_warps=8
        )
        launch(rms_norm_weight_partial_kernel, (triton.cdiv(hidden, WIDE_TILE) * partial.shape[0],))(
            grad_y, x, rstd, partial, n_rows, H=hidden, TILE=WIDE_TILE, ROWS=WIDE_ROWS, num_warps=8
        )
    else:
        c0, c1, c2 = column_tiles(hidden)
        rows = rows_per_program(hidden)
        programs = backward_programs(n_rows, hidden, multiprocessors(x.device))
        partial = x.new_empty((programs, hidden), dtype=torch.float32)
        launch(_rms_norm_bwd_kernel, (programs,))(
            grad_y, x, weight, rstd, grad_sum, grad_x, partial, n_rows,
            H=hidden, R=rows, C0=c0, C1=c1, C2=c2, ADD=add, num_warps=backward_warps(hidden),
        )  # fmt: skip
    launch(_rms_norm_weight_final_kernel, (triton.cdiv(hidden, FINAL_COLS),))(
        partial, grad_weight, partial.shape[0], H=hidden, ROWS=FINAL_ROWS, COLS=FINAL_COLS, num_warps=4
    )
    return grad_x, grad_weight


def compile_cases() -> tuple[CompileCase, ...]:
    """Every kernel at every benchmark width, for the ahead-of-time gate."""
    # bf16 differs from fp16 only in the conversions, so the flagship width stands for it
    widths = [(hidden, "fp16") for hidden in BENCHMARK_HIDDEN] + [(4352, "bf16")]
    return tuple(case for hidden, dtype in widths for case in _compile_cases(hidden, dtype))


def _compile_cases(hidden: int, dtype: str) -> list[CompileCase]:
    c0, c1, c2 = column_tiles(hidden)
    tiles = {"H": hidden, "R": rows_per_program(hidden), "C0": c0, "C1": c1, "C2": c2}
    data, stats = f"*{dtype}", "*fp32"
    forward = {
        "x_ptr": data,
        "residual_ptr": data,
        "weight_ptr": data,
        "y_ptr": data,
        "sum_ptr": data,
        "rstd_ptr": stats,
    }
    backward = {"grad_y_ptr": data, "x_ptr": data, "weight_ptr": data, "rstd_ptr": stats, "grad_sum_ptr": data}
    backward |= {"grad_x_ptr": data, "partial_ptr": stats}
    cases = []
    for add, prefix in ((False, ""), (True, "add_")):
        cases.append(
            CompileCase(
                f"{prefix}forward/{hidden}/{dtype}", _rms_norm_fwd_kernel, forward | {"n_rows": "i32", "eps": "fp32"},
                tiles | {"ADD": add}, tuple(forward), forward_warps(hidden),
            )
        )  # fmt: skip
        cases.append(
            CompileCase(
                f"{prefix}backward/{hidden}/{dtype}", _rms_norm_bwd_kernel, backward | {"n_rows": "i32"},
                tiles | {"ADD": add}, tuple(backward), backward_warps(hidden),
            )
        )  # fmt: skip
    final = {"partial_ptr": stats, "grad_weight_ptr": data, "n_partials": "i32"}
    cases.append(
        CompileCase(
            f"weight_final/{hidden}/{dtype}", _rms_norm_weight_final_kernel, final,
            {"H": hidden, "ROWS": FINAL_ROWS, "COLS": FINAL_COLS},
            ("partial_ptr", "grad_weight_ptr"), 4,
        )
    )  # fmt: skip
    return cases
