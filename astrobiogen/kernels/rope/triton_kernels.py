"""Rotary position embedding on NVIDIA GPUs; its gradient is the same kernel with sin negated. Formulas: `reference.py`;
bytes and floor: `README.md`.

One program rotates a tile of tokens x heads; a token's cos and sin are read once for all heads of the tile. The r/2
pairs of a head are covered by at most two power-of-two tiles of columns (34 = 32 + 2, instead of 64 with 47 % of the
lanes idle).
"""

import math

import torch
import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.rope.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.triton_launch import launch, wide

# Pairs per program: 16 per thread of 4 warps, i.e. 32 elements in and out, and about 20 registers of addresses.
PAIRS_PER_PROGRAM = 2048
NUM_WARPS = 4
# Heads of one program; more would leave too few programs on a short sequence (512 tokens x 64 heads: 1024 programs).
MAX_HEADS = 32


@triton.jit
def _table(pointer, tokens, live, columns, START: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):
    """Tile [T, 1, COLS] of cos or sin; tokens and columns outside give 0."""
    offsets = tokens[:, None, None] * HALF + columns[None, None, :]
    mask = live[:, None, None]
    if START + COLS > HALF:
        mask = mask & (columns < HALF)[None, None, :]
    return wide(tl.load(pointer + offsets, mask=mask, other=0.0))


@triton.jit
def _rotate_halves(source, target, live, cos, sin, START: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):
    """Pairs (i, i + HALF) for COLS pairs from START on; `source` and `target` [T, heads, 1] point at head starts."""
    columns = (START + tl.arange(0, COLS))[None, None, :]
    if START + COLS > HALF:
        live = live & (columns < HALF)
    first = wide(tl.load(source + columns, mask=live, other=0.0))
    second = wide(tl.load(source + (HALF + columns), mask=live, other=0.0))
    cos = cos.to(first.dtype)
    sin = sin.to(first.dtype)
    element = target.dtype.element_ty
    tl.store(target + columns, (first * cos - second * sin).to(element), mask=live)
    tl.store(target + (HALF + columns), (second * cos + first * sin).to(element), mask=live)


@triton.jit
def _rotate_pairs(source, target, live, cos, sin, START: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):
    """Pairs (2i, 2i + 1) for COLS pairs from START on: one contiguous tile of 2 COLS columns, split in registers."""
    columns = (2 * START + tl.arange(0, 2 * COLS))[None, None, :]
    if START + COLS > HALF:
        live = live & (columns < 2 * HALF)
    tile = wide(tl.load(source + columns, mask=live, other=0.0))
    first, second = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], COLS, 2]))
    cos = cos.to(tile.dtype)
    sin = sin.to(tile.dtype)
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    value = tl.reshape(turned, [tile.shape[0], tile.shape[1], 2 * COLS])
    tl.store(target + columns, value.to(target.dtype.element_ty), mask=live)


@triton.jit
def _copy(source, target, live, START: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START .. START + COLS that are not rotated."""
    columns = (START + tl.arange(0, COLS))[None, None, :]
    if START + COLS > WIDTH:
        live = live & (columns < WIDTH)
    tl.store(target + columns, tl.load(source + columns, mask=live, other=0.0), mask=live)


@triton.jit(do_not_specialize=["length", "heads", "blocks", "x_batch", "x_token", "x_head", "table_rows"])
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, length, heads, blocks, x_batch, x_token, x_head, table_rows,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Program (p, h): tokens (p % blocks) * TOKENS .. of sequence p // blocks, heads h * HEADS ...

    C0 + C1 >= HALF rotated pairs and R0 + R1 >= WIDTH - 2 HALF copied columns; a tile of 0 is absent. Strides are
    counted in UNIT elements: how far addresses are aligned is compiled in, and no length is.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = (tl.program_id(0) % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    token_live = tokens < length
    live = token_live[:, None, None] & (head < heads)[None, :, None]
    source = x_ptr + batch * x_batch * UNIT
    source += (tokens[:, None, None] * x_token + (head.to(tl.int64) * x_head)[None, :, None]) * UNIT
    target = out_ptr + ((batch * length + tokens)[:, None, None] * heads + head[None, :, None]) * WIDTH
    cos_ptr += batch * table_rows * HALF
    sin_ptr += batch * table_rows * HALF
    if C0 > 0:
        pairs = tl.arange(0, C0)
        cos = _table(cos_ptr, tokens, token_live, pairs, 0, C0, HALF)
        sin = _table(sin_ptr, tokens, token_live, pairs, 0, C0, HALF)
        if TRANSPOSED:
            sin = -sin
        if INTERLEAVED:
            _rotate_pairs(source, target, live, cos, sin, 0, C0, HALF)
        else:
            _rotate_halves(source, target, live, cos, sin, 0, C0, HALF)
    if C1 > 0:
        rest = C0 + tl.arange(0, C1)
        cos1 = _table(cos_ptr, tokens, token_live, rest, C0, C1, HALF)
        sin1 = _table(sin_ptr, tokens, token_live, rest, C0, C1, HALF)
        if TRANSPOSED:
            sin1 = -sin1
        if INTERLEAVED:
            _rotate_pairs(source, target, live, cos1, sin1, C0, C1, HALF)
        else:
            _rotate_halves(source, target, live, cos1, sin1, C0, C1, HALF)
    if R0 > 0:
        _copy(source, target, live, 2 * HALF, R0, WIDTH)
    if R1 > 0:
        _copy(source, target, live, 2 * HALF + R0, R1, WIDTH)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, transposed: bool) -> torch.Tensor:
    """The op `rope` on CUDA. x is read through its own strides; only columns that are not contiguous are copied."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, length, heads, width = x.shape
    half = cos.shape[-1]
    constants = constants_of(heads, width, half)
    blocks = triton.cdiv(length, constants["TOKENS"])
    table_rows = length if cos.dim() == 3 and cos.shape[0] > 1 else 0
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride())]
    unit = math.gcd(16 // x.element_size(), *strides)
    launch(_rope_kernel, (batch * blocks, triton.cdiv(heads, constants["HEADS"])))(
        x, cos, sin, out, length, heads, blocks, *(stride // unit for stride in strides), table_rows,
        UNIT=unit, INTERLEAVED=interleaved, TRANSPOSED=transposed, num_warps=NUM_WARPS, **constants,
    )  # fmt: skip
    return out


def column_tiles(columns: int) -> tuple[int, int]:
    """Power-of-two tiles (first, second) that cover `columns`; 0 means absent, only the last may be masked.

    34 = 32 + 2, 64 = 64 + 0, 48 = 32 + 16, 35 = 32 + 4 (3 live columns).
    """
    if columns == 0:
        return 0, 0
    first = 1 << (columns.bit_length() - 1)
    rest = columns - first
    return first, 1 << (rest - 1).bit_length() if rest else 0


def constants_of(heads: int, width: int, half: int) -> dict[str, int]:
    """Tile sizes of one program, for heads of `width` columns of which 2 x `half` turn."""
    c0, c1 = column_tiles(half)
    r0, r1 = column_tiles(width - 2 * half)
    widest = max(c0, r0, 1)
    head_tile = min(MAX_HEADS, 1 << (heads - 1).bit_length(), max(1, PAIRS_PER_PROGRAM // widest))
    tokens = max(1, min(16, PAIRS_PER_PROGRAM // (head_tile * widest)))
    tiles = {"TOKENS": tokens, "HEADS": head_tile, "C0": c0, "C1": c1, "R0": r0, "R1": r1}
    return {"WIDTH": width, "HALF": half} | tiles


def compile_cases() -> tuple[CompileCase, ...]:
    """The kernel at every benchmark size with both pairings, for the ahead-of-time gate.

    The sequence length only changes integer arguments, and `transposed` one sign: the flagship alone has it, and bf16.
    """
    sizes = {(size.heads, size.width, size.rotary): size for size in BENCHMARK_SIZES}
    flagship = BENCHMARK_SIZES[0]
    return (
        *(_compile_case(size, "fp16", interleaved, False) for size in sizes.values() for interleaved in (False, True)),
        _compile_case(flagship, "fp16", False, True),
        _compile_case(flagship, "bf16", False, False),
    )


def _compile_case(size: Size, dtype: str, interleaved: bool, transposed: bool) -> CompileCase:
    constants = constants_of(size.heads, size.width, size.rotary // 2)
    numbers = ("length", "heads", "blocks", "x_batch", "x_token", "x_head", "table_rows")
    unit = math.gcd(8, size.width)
    pointers = {"x_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    constants |= {"UNIT": unit, "INTERLEAVED": interleaved, "TRANSPOSED": transposed}
    kind = ("pairs" if interleaved else "halves") + ("/transposed" if transposed else "")
    # heads of 68 columns start at multiples of 8 bytes only
    vector = size.width * 2 % 16 == 0 and (size.rotary // 2) * 2 % 16 == 0
    return CompileCase(
        f"{kind}/{size.length}x{size.heads}x{size.width}r{size.rotary}/{dtype}",
        _rope_kernel,
        pointers | dict.fromkeys(numbers, "i32"),
        constants,
        tuple(pointers),
        NUM_WARPS,
        needs_vector_loads=vector,
    )
