"""From tensors to kernel launches: how each operand is read, packed copies, grids and compile-time arguments.

A launch is data (`Launch`) and is handed to `Machine.launch`: at run time that starts it, and the ahead-of-time gate
collects it instead, so that what the gate compiles is what the launchers launch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton

from astrobiogen.kernels.attention import reference, triton_config
from astrobiogen.kernels.attention.reference import Options
from astrobiogen.kernels.attention.triton_backward import grad_key_kernel, grad_query_kernel, row_constants_kernel
from astrobiogen.kernels.attention.triton_config import Tile
from astrobiogen.kernels.attention.triton_forward import combine_kernel, forward_kernel, pack_kernel
from astrobiogen.kernels.triton_launch import capability, launch, multiprocessors

LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments by the kernel's order, compile-time arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int = 1

    def run(self) -> None:
        """Start it on the device of its tensors."""
        launch(self.kernel, self.grid)(*self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where launches go. `capability`: major * 10 + minor, 0 for Triton's interpreter."""

    capability: int
    multiprocessors: int
    launch: Callable[[Launch], None] = Launch.run


def machine_of(device: torch.device) -> Machine:
    """The CUDA device, or the interpreter for CPU tensors."""
    return Machine(capability(device), multiprocessors(device))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A [B, S, heads, columns] or [B, heads, S, columns] tensor as the kernels read it."""

    data: torch.Tensor
    strides: tuple[int, int, int]  # batch, token, head, in units of `unit` elements
    unit: int  # the largest power of two up to 16 bytes that divides all strides
    width: int  # columns that may be read without a mask
    finite: bool = False  # a copy without NaN and infinities


class RowConstants(NamedTuple):
    """What the backward kernels read of each row, [B, Hq, Sq rounded up to CONSTANT_ROWS] in fp32."""

    log_sums: torch.Tensor
    delta: torch.Tensor
    factors: torch.Tensor | None  # of dO; None in half precision


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every launch of one call shares."""

    machine: Machine
    q: torch.Tensor
    k: torch.Tensor
    options: Options
    cos: torch.Tensor
    sin: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    head: dict[str, Any]  # compile-time arguments: how a head is cut and rotated
    masks: dict[str, bool]

    @property
    def width(self) -> int:
        """Columns of a packed row."""
        return self.head["MAIN"] + self.head["TAIL"]

    @property
    def tiles(self) -> triton_config.Tiles:
        """Tile sizes on this machine."""
        return triton_config.tiles(self.machine.capability, self.width, self.q.dtype)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def scales(self) -> tuple[float, float]:
        """Arguments `scale` and `softcap` of the kernels: scores in units of log 2."""
        o = self.options
        return (o.scale / o.softcap, o.softcap * LOG2E) if o.softcap > 0 else (o.scale * LOG2E, 0.0)

    @property
    def precision(self) -> str:
        """How a dot multiplies; "tf32" has no effect on half precision."""
        if self.machine.capability == 0:
            return "widened"
        return "ieee" if self.q.dtype == torch.float32 else "tf32"

    def angle_rows(self, tokens: int) -> tuple[int, int]:
        """Elements from one batch's angles to the next, and the row of the first of the last `tokens` tokens."""
        if not self.head["ROTARY"]:
            return 0, 0
        rows = self.cos.shape[-2]
        return (rows * self.head["ROTARY"] if self.cos.dim() == 3 else 0), rows - tokens


def make_problem(machine: Machine, q: torch.Tensor, k: torch.Tensor, o: Options) -> Problem:
    """Cut the head and settle what is compiled in."""
    main, tail = triton_config.cut_head(q.shape[-1])
    starts, ends = (q, q) if o.cu_seqlens is None else reference.segment_bounds(o.cu_seqlens, q.shape[1])
    cos, sin, rotary = q, q, 0  # never read without rotation
    if o.cos is not None and o.sin is not None:
        cos, sin, rotary = o.cos.float().contiguous(), o.sin.float().contiguous(), o.cos.shape[-1]
    head = {"DIM": q.shape[-1], "MAIN": main, "TAIL": tail, "ROTARY": rotary}
    head |= {"INTERLEAVED": o.interleaved and rotary > 0}
    # Farther than any key, and no 32-bit sum overflows.
    o = o._replace(window=min(o.window, q.shape[1] + k.shape[1]))
    masks = {"CAUSAL": o.causal, "WINDOW": o.window > 0, "PACKED": o.cu_seqlens is not None}
    return Problem(machine, q, k, o, cos, sin, starts, ends, head, masks)


def _in_place(x: torch.Tensor) -> Rows:
    """`x` [B, S, heads, D] through its own strides; only columns that are not contiguous are copied."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride())]
    unit = math.gcd(16 // x.element_size(), x.data_ptr() // x.element_size(), *strides)
    return Rows(x, (strides[0] // unit, strides[1] // unit, strides[2] // unit), unit, x.shape[-1])


def packed(
    p: Problem,
    x: torch.Tensor,
    *,
    turn: bool,
    copy: bool = True,
    finite: bool = False,
    factors: torch.Tensor | None = None,
) -> Rows:
    """`x` itself if its rows can be loaded 16 bytes at a time as they are, or if `copy` is False; else, and for `turn`
    with angles or with `factors` of the rows [B, heads, >= S], a copy [B, heads, S, MAIN + TAIL], rotated if `turn`,
    times `factors`, and clamped to finite numbers if `finite`."""
    turn = turn and p.head["ROTARY"] > 0
    rows = _in_place(x)
    batch, tokens, heads, _dim = x.shape
    if tokens == 0 or not (turn or factors is not None or (copy and rows.unit * x.element_size() < 16)):
        return rows
    result = x.new_empty((batch, heads, tokens, p.width))
    rotation = {"ROTARY": p.head["ROTARY"] if turn else 0, "INTERLEAVED": turn and p.head["INTERLEAVED"]}
    constants = {"X_UNIT": rows.unit, "FACTORS": factors is not None, "BLOCK": triton_config.PACK_ROWS}
    constants |= {"LARGEST": torch.finfo(x.dtype).max if finite else 0.0}
    factors, padded = (result, 0) if factors is None else (factors, factors.shape[-1])
    p.machine.launch(
        Launch(
            pack_kernel,
            (batch * heads * triton.cdiv(tokens, triton_config.PACK_ROWS),),
            (rows.data, p.cos, p.sin, factors, result, *rows.strides, tokens, heads, padded, *p.angle_rows(tokens)),
            p.head | rotation | constants,
            triton_config.PACK_WARPS,
        )
    )
    unit = 16 // x.element_size()
    strides = (heads * tokens * p.width // unit, p.width // unit, tokens * p.width // unit)
    return Rows(result, strides, unit, p.width, finite)


def attend(p: Problem, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, rest: torch.Tensor) -> None:
    """The forward pass into `out`, `lse` and, for half precision, `rest`."""
    keys, values = packed(p, p.k, turn=True), packed(p, v, turn=False)
    tile = p.tiles.forward
    grid = (p.q.shape[0] * p.q.shape[2], triton.cdiv(p.q.shape[1], tile.block_m))
    p.machine.launch(_forward(p, grid, tile, keys, values, (out, lse, lse, rest)))


def attend_few(p: Problem, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, rest: torch.Tensor) -> None:
    """The forward pass of few queries: the group's heads fill the rows of a tile, and the keys are cut into chunks that
    are merged in order. A copy of the keys would cost more than it saves: they are read in place, however aligned.
    """
    keys, values = packed(p, p.k, turn=True, copy=False), packed(p, v, turn=False, copy=False)
    (batch, queries, heads, dim), n_keys = p.q.shape, p.k.shape[1]
    tile = triton_config.few_tile(p.machine.capability, p.q.dtype)
    pairs, blocks = batch * p.k.shape[2], triton.cdiv(queries * p.group, tile.block_m)
    first = max(0, n_keys - queries + 1 - p.options.window) if p.options.window > 0 else 0
    first = first // tile.block_n * tile.block_n
    programs = triton_config.SPLIT_PROGRAMS_PER_SM * p.machine.multiprocessors
    smallest = triton_config.SPLIT_CHUNK if p.machine.capability else tile.block_n
    splits = max(1, min(triton.cdiv(n_keys - first, smallest), triton.cdiv(programs, pairs * blocks)))
    chunk = triton.cdiv(triton.cdiv(n_keys - first, splits), tile.block_n) * tile.block_n
    partial = out.new_empty((*lse.shape, splits, p.width), dtype=torch.float32)
    tops, totals = out.new_empty((2, *lse.shape, splits), dtype=torch.float32)
    results = (partial, tops, totals, rest)
    p.machine.launch(
        _forward(p, (pairs, blocks, splits), tile, keys, values, results, heads=p.group, chunk=(first, chunk))
    )
    sinks = p.options.sinks
    shape = {"DIM": dim, "WIDTH": p.width, "COLUMNS": triton.next_power_of_2(p.width), "SINKS": sinks is not None}
    shape |= {"REST": rest.numel() > 0}
    arguments = (partial, tops, totals, p.q if sinks is None else sinks, out, lse, rest, heads, queries, splits)
    p.machine.launch(Launch(combine_kernel, (batch * heads * queries,), arguments, shape, 1))


def _forward(
    p: Problem,
    grid: tuple[int, ...],
    tile: Tile,
    keys: Rows,
    values: Rows,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    heads: int = 1,
    chunk: tuple[int, int] | None = None,
) -> Launch:
    """`heads`: how many share the rows of a program; `chunk`: (first key, keys per program) of split keys."""
    rows, sinks = _in_place(p.q), p.options.sinks
    arguments = (
        *(rows.data, keys.data, values.data, p.cos, p.sin, p.starts, p.ends, p.q if sinks is None else sinks),
        *(*results, *rows.strides, *keys.strides, *values.strides),
        *(p.q.shape[2], p.group, p.q.shape[1], p.k.shape[1], *p.angle_rows(p.q.shape[1]), *(chunk or (0, 0))),
        *(*p.scales, p.options.window),
    )
    reading = {"K_WIDTH": keys.width, "V_WIDTH": values.width}
    reading |= {"Q_UNIT": rows.unit, "K_UNIT": keys.unit, "V_UNIT": values.unit}
    options = {"SOFTCAP": p.options.softcap > 0, "SINKS": sinks is not None, "HEADS": heads, "SPLIT": chunk is not None}
    options |= {"REST": chunk is None and results[3].numel() > 0}
    options |= {"PRECISION": p.precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants = {**p.head, **p.masks, **reading, **options}
    return Launch(forward_kernel, grid, arguments, constants, tile.warps, tile.stages)


def row_constants(
    p: Problem,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> RowConstants:
    """Of one backward pass."""
    batch, queries, heads, dim = out.shape
    blocks = triton.cdiv(queries, triton_config.CONSTANT_ROWS)
    half = reference.is_half(out.dtype)
    shape = (2 if half else 3, batch, heads, blocks * triton_config.CONSTANT_ROWS)
    log_sums, delta, *factors = out.new_empty(shape, dtype=torch.float32)
    left, right, lse = _in_place(grad), _in_place(out), lse.contiguous()
    incoming = lse if grad_lse is None else grad_lse.contiguous()
    constants = {"DIM": dim, "COLUMNS": max(16, triton.next_power_of_2(dim)), "G_UNIT": left.unit, "O_UNIT": right.unit}
    constants |= {"REST": half, "GRAD_LSE": grad_lse is not None, "BLOCK": triton_config.CONSTANT_ROWS}
    tensors = (left.data, right.data, lse, rest.contiguous(), incoming, log_sums, delta, delta if half else factors[0])
    arguments = (*tensors, *left.strides, *right.strides, heads, queries)
    p.machine.launch(
        Launch(row_constants_kernel, (batch * heads, blocks), arguments, constants, triton_config.CONSTANT_WARPS)
    )
    return RowConstants(log_sums, delta, None if half else factors[0])


def differentiate(
    p: Problem,
    v: torch.Tensor,
    grad: torch.Tensor,
    constants: RowConstants,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The backward pass into `grads`, the gradients of q, k and v; `constants` from `row_constants`."""
    grad_q, grad_k, grad_v = grads
    rows = (
        packed(p, p.q, turn=True, finite=True),
        packed(p, p.k, turn=True, finite=True),
        packed(p, v, turn=False),
        packed(p, grad, turn=False, finite=True, factors=constants.factors),
    )
    batch, queries, heads, _ = p.q.shape
    _, keys, kv_heads, _ = p.k.shape
    tile = p.tiles.grad_query
    grid = (batch * heads, triton.cdiv(queries, tile.block_m))
    p.machine.launch(_backward(p, grad_query_kernel, grid, tile, rows, constants, (grad_q,), queries))
    if keys:
        masked = p.options.window > 0 or p.options.softcap > 0 or p.options.cu_seqlens is not None
        tile = p.tiles.grad_key_masked if masked else p.tiles.grad_key
        grid = (batch * kv_heads, triton.cdiv(keys, tile.block_n))
        p.machine.launch(_backward(p, grad_key_kernel, grid, tile, rows, constants, (grad_k, grad_v), keys))


def _backward(
    p: Problem,
    kernel: Any,
    grid: tuple[int, int],
    tile: Tile,
    rows: tuple[Rows, Rows, Rows, Rows],
    constants_of_rows: RowConstants,
    grads: tuple[torch.Tensor, ...],
    tokens: int,
) -> Launch:
    """Both backward kernels take the same numbers; `tokens`: rows of `grads`, which are turned back."""
    arguments = (
        *(r.data for r in rows),
        *(*constants_of_rows[:2], p.cos, p.sin, p.starts, p.ends, *grads),
        *(stride for r in rows for stride in r.strides),
        *(p.q.shape[2], p.group, p.q.shape[1], constants_of_rows.delta.shape[-1], p.k.shape[1], *p.angle_rows(tokens)),
        *(*p.scales, p.options.scale, p.options.window),
    )
    reading = {f"{name}_WIDTH": r.width for name, r in zip("QKVG", rows)}
    reading |= {f"{name}_UNIT": r.unit for name, r in zip("QKVG", rows)}
    options = {"SOFTCAP": p.options.softcap > 0, "PRECISION": p.precision}
    if kernel is grad_key_kernel:
        options |= {"ONE_LOOP": tile.one_loop, "Q_FINITE": rows[0].finite, "G_FINITE": rows[3].finite}
    else:
        options["K_FINITE"] = rows[1].finite
    options |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return Launch(kernel, grid, arguments, {**p.head, **p.masks, **reading, **options}, tile.warps, tile.stages)
