"""SwiGLU on NVIDIA GPUs, forward and backward, from separate or packed gate and up. Formulas: `reference.py`; bytes and
floors: `README.md`.

One program takes `TILE` columns of one row. Contiguous tensors are one long row, so an odd width (11605) keeps 16-byte
loads; halves of a packed tensor are rows with a stride. Tensors whose leading axes do not merge are addressed through
two strides, and only what even two cannot describe is copied.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.swiglu.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.triton_launch import launch, wide

# Columns per program: one 16-byte load per thread and tensor in half precision (two in fp32). Enough programs fit on a
# multiprocessor to keep more in flight than either memory needs (the op's notes).
TILE = 1024
# Columns per warp: 32 threads x 8.
COLUMNS_PER_WARP = 256


@triton.jit
def _load(pointer, columns, live, stride, MASKED: tl.constexpr):
    """A tile in the accumulation dtype; columns that are not live give 0."""
    if MASKED:
        return wide(tl.load(pointer + columns * stride, mask=live, other=0.0))
    return wide(tl.load(pointer + columns * stride))


@triton.jit
def _store(pointer, value, columns, live, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=live)
    else:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty))


@triton.jit
def _gate(gate):
    """sigmoid(gate) and sigmoid(-gate) from one exponential; both keep their relative accuracy on either side of 0."""
    e = tl.exp(-tl.abs(gate))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(gate < 0, small, large), tl.where(gate < 0, large, small)


@triton.jit
def _forward_tile(
    gate_ptr, up_ptr, product_ptr, live_columns, gate_column, up_column, TILE: tl.constexpr, MASKED: tl.constexpr
):
    columns = tl.arange(0, TILE).to(tl.int64)
    live = columns < live_columns
    gate = _load(gate_ptr, columns, live, gate_column, MASKED)
    up = _load(up_ptr, columns, live, up_column, MASKED)
    opened, _ = _gate(gate)
    _store(product_ptr, gate * opened * up, columns, live, MASKED)


@triton.jit
def _backward_tile(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, product_ptr, live_columns, grad_column, gate_column,
    up_column, TILE: tl.constexpr, PRODUCT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, TILE).to(tl.int64)
    live = columns < live_columns
    grad = _load(grad_ptr, columns, live, grad_column, MASKED)
    gate = _load(gate_ptr, columns, live, gate_column, MASKED)
    up = _load(up_ptr, columns, live, up_column, MASKED)
    opened, shut = _gate(gate)
    silu = gate * opened
    _store(grad_gate_ptr, grad * up * (opened * (1.0 + gate * shut)), columns, live, MASKED)
    _store(grad_up_ptr, grad * silu, columns, live, MASKED)
    if PRODUCT:
        _store(product_ptr, silu * up, columns, live, MASKED)


@triton.jit(do_not_specialize=["columns", "tiles"], do_not_specialize_on_alignment=["inner"])
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, product_ptr, columns, tiles, inner, gate_outer, gate_inner, gate_column, up_outer, up_inner,
    up_column, product_row, TILE: tl.constexpr,
):  # fmt: skip
    """Program p: tile p % tiles of row p // tiles; row r starts at (r // inner) * outer + (r % inner) * inner
    stride."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * TILE
    outer, within = row // inner, row % inner
    gate_ptr += outer * gate_outer + within * gate_inner + start * gate_column
    up_ptr += outer * up_outer + within * up_inner + start * up_column
    product_ptr += row * product_row + start
    live = columns - start
    if live >= TILE:  # without a mask the compiler may use 16-byte loads whatever the width is
        _forward_tile(gate_ptr, up_ptr, product_ptr, live, gate_column, up_column, TILE, False)
    else:
        _forward_tile(gate_ptr, up_ptr, product_ptr, live, gate_column, up_column, TILE, True)


@triton.jit(do_not_specialize=["columns", "tiles"], do_not_specialize_on_alignment=["inner"])
def _swiglu_bwd_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, product_ptr, columns, tiles, inner, grad_outer, grad_inner,
    grad_column, gate_outer, gate_inner, gate_column, up_outer, up_inner, up_column, out_row, TILE: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """As forward; writes both gradients, rows `out_row` apart, and with PRODUCT also silu(gate) * up again."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    start = (program % tiles).to(tl.int64) * TILE
    outer, within = row // inner, row % inner
    grad_ptr += outer * grad_outer + within * grad_inner + start * grad_column
    gate_ptr += outer * gate_outer + within * gate_inner + start * gate_column
    up_ptr += outer * up_outer + within * up_inner + start * up_column
    out = row * out_row + start
    live = columns - start
    if live >= TILE:
        _backward_tile(
            grad_ptr, gate_ptr, up_ptr, grad_gate_ptr + out, grad_up_ptr + out, product_ptr + out, live, grad_column,
            gate_column, up_column, TILE, PRODUCT, False,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_ptr, gate_ptr, up_ptr, grad_gate_ptr + out, grad_up_ptr + out, product_ptr + out, live, grad_column,
            gate_column, up_column, TILE, PRODUCT, True,
        )  # fmt: skip


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op `swiglu` on CUDA."""
    product = gate.new_empty(gate.shape)
    if product.numel() == 0:
        return product
    (gate, up), rows, columns, inner, strides = _rows((gate, up), dense_output=True)
    tile, warps = tile_of(columns)
    tiles = triton.cdiv(columns, tile)
    launch(_swiglu_fwd_kernel, (rows * tiles,))(
        gate,
        up,
        product,
        columns,
        tiles,
        inner,
        *strides[0],
        *strides[1],
        _row(rows, columns),
        TILE=tile,
        num_warps=warps,
    )
    return product


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    """The op `swiglu_packed` on CUDA: two views, no copy."""
    return swiglu(*gate_up.chunk(2, dim=-1)) if gate_up.shape[-1] else gate_up.new_empty(gate_up.shape)


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `swiglu_backward` on CUDA."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch_backward(grad, gate, up, grad_gate, grad_up, None)
    return grad_gate, grad_up


def swiglu_packed_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The op `swiglu_packed_backward` on CUDA: the kernel writes both halves of one gradient."""
    packed = gate_up.new_empty(gate_up.shape)
    if packed.numel() > 0:
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate, grad_up = packed.chunk(2, dim=-1)
        _launch_backward(grad, gate, up, grad_gate, grad_up, None)
    return packed


def swiglu_backward_product(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `swiglu_backward_product` on CUDA."""
    grad_gate, grad_up, product = gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty(gate.shape)
    _launch_backward(grad, gate, up, grad_gate, grad_up, product)
    return grad_gate, grad_up, product


def _launch_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
    product: torch.Tensor | None,
) -> None:
    """Outputs are dense, or the two halves of a dense packed tensor (then without `product`)."""
    if gate.numel() == 0:
        return
    dense = grad_gate.is_contiguous() and grad_up.is_contiguous()
    (grad, gate, up), rows, columns, inner, strides = _rows((grad, gate, up), dense_output=dense)
    tile, warps = tile_of(columns)
    tiles = triton.cdiv(columns, tile)
    out_row = _row(rows, columns if dense else 2 * columns)
    launch(_swiglu_bwd_kernel, (rows * tiles,))(
        grad, gate, up, grad_gate, grad_up, grad_gate if product is None else product, columns, tiles, inner,
        *strides[0], *strides[1], *strides[2], out_row, TILE=tile, PRODUCT=product is not None, num_warps=warps,
    )  # fmt: skip


def _row(rows: int, step: int) -> int:
    """Elements from one row to the next, 0 for a single one: its number of columns has no part in the code."""
    return step if rows > 1 else 0


def tile_of(columns: int) -> tuple[int, int]:
    """Columns and warps of one program, for rows of `columns`."""
    tile = min(TILE, max(32, 1 << (columns - 1).bit_length()))
    return tile, max(1, tile // COLUMNS_PER_WARP)


Strides = tuple[int, int, int]


def _rows(
    tensors: Sequence[torch.Tensor], dense_output: bool
) -> tuple[Sequence[torch.Tensor], int, int, int, list[Strides]]:
    """Describe equally shaped tensors as rows of columns: (tensors, rows, columns, inner, [(outer, inner, column)]).

    Axes merge where every tensor is dense across the seam; with `dense_output` they may also merge into the columns.
    If more than two axes of rows are left, the tensors that are not contiguous are copied.
    """
    if dense_output and all(tensor.is_contiguous() for tensor in tensors):
        return tensors, 1, tensors[0].numel(), 1, [(0, 0, 1)] * len(tensors)
    shape = tensors[0].shape
    axes = [(shape[-1], tuple(tensor.stride(-1) for tensor in tensors))]  # innermost first
    for axis in range(len(shape) - 2, -1, -1):
        size, strides = shape[axis], tuple(tensor.stride(axis) for tensor in tensors)
        inner_size, inner_strides = axes[-1]
        mergeable = len(axes) > 1 or dense_output
        if mergeable and all(outer == inner * inner_size for outer, inner in zip(strides, inner_strides)):
            axes[-1] = (inner_size * size, inner_strides)
        elif size > 1:
            axes.append((size, strides))
    if len(axes) > 3:
        return _rows([tensor.contiguous() for tensor in tensors], dense_output)
    none = (1, (0,) * len(tensors))
    (columns, column_strides), (inner, inner_strides), (outer, outer_strides) = [*axes, none, none][:3]
    return tensors, inner * outer, columns, inner, list(zip(outer_strides, inner_strides, column_strides))


def compile_cases() -> tuple[CompileCase, ...]:
    """Every kernel at every benchmark width, separate and packed, for the ahead-of-time gate.

    The number of rows only changes integer arguments, so one size per width is compiled.
    """
    sizes = {size.columns: size for size in BENCHMARK_SIZES}
    combinations = [("fp16", size) for size in sizes.values()] + [("bf16", sizes[11648])]
    return tuple(
        case for dtype, size in combinations for packed in (False, True) for case in _compile_cases(size, dtype, packed)
    )


def _compile_cases(size: Size, dtype: str, packed: bool) -> list[CompileCase]:
    """The specialisations that the launchers request: a stride of 0 or 1 is a constant, multiples of 16 are marked."""
    columns = size.columns if packed else size.rows * size.columns
    rows = size.rows if packed else 1
    tile, warps = tile_of(columns)
    numbers = {"columns": columns, "tiles": triton.cdiv(columns, tile), "inner": rows}
    source = {"outer": 0, "inner": 2 * columns if packed else 0, "column": 1}
    dense = {"outer": 0, "inner": columns if packed else 0, "column": 1}
    for name, strides in (("gate", source), ("up", source), ("grad", dense)):
        numbers |= {f"{name}_{axis}": stride for axis, stride in strides.items()}
    numbers |= {"product_row": _row(rows, columns), "out_row": _row(rows, 2 * columns)}
    vector = not packed or columns % 16 == 0  # packed odd rows start at 2-byte addresses
    suffix = f"{'packed/' if packed else ''}{size.columns}/{dtype}"
    cases = []
    for label, kernel, flags in (
        ("forward", _swiglu_fwd_kernel, {}),
        ("backward", _swiglu_bwd_kernel, {"PRODUCT": False}),
        ("backward_product", _swiglu_bwd_kernel, {"PRODUCT": True}),
    ):
        if packed and label == "backward_product":
            continue
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        # the second half of an odd packed row is 2 bytes off any 16-byte line
        aligned = [name for name in pointers if vector or name not in ("up_ptr", "grad_up_ptr")]
        integers = {name: numbers[name] for name in kernel.arg_names if name in numbers}
        free = {name: value for name, value in integers.items() if value != 1}
        signature = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(free, "i32")
        constants = {name: 1 for name, value in integers.items() if value == 1} | {"TILE": tile, **flags}
        aligned += [name for name, value in free.items() if value % 16 == 0]
        cases.append(
            CompileCase(
                f"{label}/{suffix}", kernel, signature, constants, tuple(aligned), warps, needs_vector_loads=vector
            )
        )
    return cases
