"""Launchers of the attention kernels: they take exactly the ops' arguments. Tiles: triton_config.py."""

import dataclasses
from typing import Any

import torch
import triton

from astrobiogen.kernels._case import CompileCase
from astrobiogen.kernels.attention import reference, triton_config
from astrobiogen.kernels.attention.triton_backward import delta_kernel, grad_key_kernel, grad_query_kernel
from astrobiogen.kernels.attention.triton_cases import cases
from astrobiogen.kernels.attention.triton_forward import combine_kernel, decode_kernel, forward_kernel, pack_kernel

LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What every launch of one call shares."""

    q: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    angle_batch: int
    angle_rows: int
    causal: bool
    scale: float
    window: int
    softcap: float
    options: dict[str, Any]  # constexpr arguments

    @property
    def score_scale(self) -> float:
        return self.scale / self.softcap if self.softcap > 0 else self.scale * LOG2E

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.q.shape[2], self.q.shape[2] // self.k.shape[2], self.q.shape[1], self.k.shape[1]

    @property
    def masks(self) -> dict[str, bool]:
        packed = self.starts.dtype == torch.int32
        return {"CAUSAL": self.causal, "WINDOW": self.window > 0, "PACKED": packed}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A [B, S, heads, columns] or [B, heads, S, columns] tensor as the kernels read it."""

    data: torch.Tensor
    strides: tuple[int, int, int]  # batch, token, head
    width: int  # columns that may be read without a mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `attention` on CUDA."""
    batch, queries, heads, _dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide)
    if out.numel() == 0:
        return out, lse
    if q.dtype == torch.float64:  # gradient checks only: no tensor-core path and no fp64 tiles
        return reference.attention_forward(
            q, k, v, cos, sin, cu_seqlens, sinks, causal, scale, window, softcap, interleaved
        )
    p = _problem(q, k, cos, sin, cu_seqlens, causal, scale, window, softcap, interleaved)
    with torch.cuda.device_of(q):
        keys, values = _packed(p, p.k, turn=True), _packed(p, v, turn=False)
        if queries == 1 and cu_seqlens is None:
            _decode(p, keys, values, sinks, out, lse)
        else:
            _prefill(p, keys, values, sinks, out, lse)
    return out, lse


def attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `attention_backward` on CUDA."""
    if q.dtype == torch.float64:
        return reference.attention_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            cos,
            sin,
            cu_seqlens,
            sinks,
            causal,
            scale,
            window,
            softcap,
            interleaved,
        )
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if q.numel() == 0:
        grad_sinks = q.new_empty(0, dtype=torch.float32) if sinks is None else torch.zeros_like(sinks)
        return grad_q, grad_k.zero_(), grad_v.zero_(), grad_sinks
    p = _problem(q, k, cos, sin, cu_seqlens, causal, scale, window, softcap, interleaved)
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    with torch.cuda.device_of(q):
        delta = _delta(grad, out, grad_lse)
        rows = (
            _packed(p, p.q, turn=True),
            _packed(p, p.k, turn=True),
            _packed(p, v, turn=False),
            _packed(p, grad, turn=False),
        )
        _grad_queries(p, rows, lse, delta, grad_q)
        if grad_k.numel():
            _grad_keys(p, rows, lse, delta, grad_k, grad_v)
    if sinks is None:
        return grad_q, grad_k, grad_v, q.new_empty(0, dtype=torch.float32)
    weight = torch.exp(sinks.float()[:, None] - lse)  # [B, Hq, Sq]: the sink's share of every row
    return grad_q, grad_k, grad_v, (-weight * delta).sum(dim=(0, 2)).to(sinks.dtype)


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    interleaved: bool,
) -> _Problem:
    main, tail = triton_config.cut_head(q.shape[-1])
    rotary, angle_rows, angle_batch = 0, 0, 0
    starts, ends = (q, q) if cu_seqlens is None else reference.segment_bounds(cu_seqlens, q.shape[1])
    angles = (q, q)  # never read without rotation
    if cos is not None and sin is not None:
        angles = (cos.float().contiguous(), sin.float().contiguous())
        rotary, angle_rows = cos.shape[-1], cos.shape[-2]
        angle_batch = angle_rows * rotary if cos.dim() == 3 else 0
    options = {"DIM": q.shape[-1], "MAIN": main, "TAIL": tail, "ROTARY": rotary, "INTERLEAVED": interleaved}
    return _Problem(
        _unit_stride(q), _unit_stride(k), *angles, starts, ends, angle_batch, angle_rows, causal, scale, window,
        softcap, options
    )  # fmt: skip


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _packed(p: _Problem, x: torch.Tensor, *, turn: bool) -> _Rows:
    """`x` itself if its rows can be loaded 16 bytes at a time as they are, else a packed copy (rotated if `turn`)."""
    x = _unit_stride(x)
    turn = turn and p.options["ROTARY"] > 0
    batch, tokens, heads, dim = x.shape
    width = p.options["MAIN"] + p.options["TAIL"]
    if (not turn and dim * x.element_size() % 16 == 0) or tokens == 0:
        return _Rows(x, (x.stride(0), x.stride(1), x.stride(2)), dim)
    packed = x.new_empty((batch, heads, tokens, width))
    options = {**p.options, "ROTARY": p.options["ROTARY"] if turn else 0}
    pack_kernel[(batch * heads, triton.cdiv(tokens, triton_config.PACK_ROWS))](
        x, p.cos, p.sin, packed, x.stride(0), x.stride(1), x.stride(2), tokens, heads, p.angle_batch,
        p.angle_rows - tokens,
        **options, BLOCK=triton_config.PACK_ROWS, num_warps=triton_config.PACK_WARPS,
    )  # fmt: skip
    return _Rows(packed, (packed.stride(0), packed.stride(2), packed.stride(1)), width)


def _tiles(p: _Problem) -> triton_config.Tiles:
    return triton_config.tiles(triton_config.capability(p.q.device), p.options["MAIN"] + p.options["TAIL"], p.q.dtype)


def _precision(x: torch.Tensor) -> str:
    if x.device.type != "cuda":
        return "widened"
    return "ieee" if x.dtype == torch.float32 else "tf32"  # has no effect on half precision


def _prefill(
    p: _Problem, keys: _Rows, values: _Rows, sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    heads, group, n_queries, n_keys = p.sizes
    tile = _tiles(p).forward
    forward_kernel[(p.q.shape[0] * heads, triton.cdiv(n_queries, tile.block_m))](
        p.q, keys.data, values.data, p.cos, p.sin, p.starts, p.ends, p.q if sinks is None else sinks, out, lse,
        p.q.stride(0), p.q.stride(1), p.q.stride(2), *keys.strides, *values.strides,
        heads, group, n_queries, n_keys, p.angle_batch, p.angle_rows - n_queries, p.score_scale, p.softcap * LOG2E,
        p.window,
        **p.options, **p.masks, K_WIDTH=keys.width, V_WIDTH=values.width, SOFTCAP=p.softcap > 0,
        SINKS=sinks is not None,
        PRECISION=_precision(p.q), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


def _decode(
    p: _Problem, keys: _Rows, values: _Rows, sinks: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> None:
    heads, group, _, n_keys = p.sizes
    pairs, head_blocks = p.q.shape[0] * (heads // group), triton.cdiv(group, triton_config.DECODE_HEADS)
    low = max(0, n_keys - p.window) if p.window > 0 else 0
    programs = triton_config.DECODE_PROGRAMS_PER_SM * triton_config.multiprocessors(p.q.device)
    smallest = triton_config.DECODE_CHUNK if p.q.device.type == "cuda" else 16
    splits = max(1, min(triton.cdiv(n_keys - low, smallest), triton.cdiv(programs, pairs * head_blocks)))
    chunk = triton.cdiv(n_keys - low, splits)
    main, tail, dim = p.options["MAIN"], p.options["TAIL"], p.options["DIM"]
    partial = out.new_empty((p.q.shape[0] * heads, splits, main + tail), dtype=torch.float32)
    stats = out.new_empty((2, p.q.shape[0] * heads, splits), dtype=torch.float32)
    tile = triton_config.DECODE_TILE
    decode_kernel[(pairs, head_blocks, splits)](
        p.q, keys.data, values.data, p.cos, p.sin, partial, stats[0], stats[1],
        p.q.stride(0), p.q.stride(2), *keys.strides, *values.strides,
        heads // group, group, n_keys, low, p.angle_batch, p.angle_rows - 1, chunk, p.score_scale, p.softcap * LOG2E,
        **p.options, K_WIDTH=keys.width, V_WIDTH=values.width, SOFTCAP=p.softcap > 0, PRECISION=_precision(p.q),
        BLOCK_G=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    combine_kernel[(p.q.shape[0] * heads,)](
        partial, stats[0], stats[1], p.q if sinks is None else sinks, out, lse, heads, splits,
        DIM=dim, WIDTH=main + tail, COLUMNS=triton.next_power_of_2(main + tail), SINKS=sinks is not None, num_warps=1,
    )  # fmt: skip


def _delta(grad: torch.Tensor, out: torch.Tensor, grad_lse: torch.Tensor | None) -> torch.Tensor:
    grad, out = _unit_stride(grad), _unit_stride(out)
    batch, queries, heads, dim = out.shape
    delta = out.new_empty((batch, heads, queries), dtype=torch.float32)
    with_lse = grad_lse is not None
    grad_lse = delta if grad_lse is None else grad_lse.contiguous()
    delta_kernel[(batch * heads, triton.cdiv(queries, triton_config.DELTA_ROWS))](
        grad, out, grad_lse, delta, grad.stride(0), grad.stride(1), grad.stride(2), out.stride(0), out.stride(1),
        out.stride(2),
        heads, queries, DIM=dim, COLUMNS=max(16, triton.next_power_of_2(dim)), GRAD_LSE=with_lse,
        BLOCK=triton_config.DELTA_ROWS,
        num_warps=4,
    )  # fmt: skip
    return delta


def _backward_arguments(
    p: _Problem, rows: tuple[_Rows, _Rows, _Rows, _Rows], tile: triton_config.Tile
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    q, k, v, grad = rows
    strides = (*q.strides, *k.strides, *v.strides, *grad.strides)
    options = {
        "Q_WIDTH": q.width,
        "K_WIDTH": k.width,
        "V_WIDTH": v.width,
        "G_WIDTH": grad.width,
        "SOFTCAP": p.softcap > 0,
    }
    options |= {"PRECISION": _precision(p.q), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return strides, {**p.options, **p.masks, **options, "num_warps": tile.warps, "num_stages": tile.stages}


def _grad_queries(
    p: _Problem, rows: tuple[_Rows, _Rows, _Rows, _Rows], lse: torch.Tensor, delta: torch.Tensor, grad_q: torch.Tensor
) -> None:
    heads, group, n_queries, n_keys = p.sizes
    tile = _tiles(p).grad_query
    strides, options = _backward_arguments(p, rows, tile)
    grad_query_kernel[(p.q.shape[0] * heads, triton.cdiv(n_queries, tile.block_m))](
        *(r.data for r in rows), lse, delta, p.cos, p.sin, p.starts, p.ends, grad_q, *strides,
        heads, group, n_queries, n_keys, p.angle_batch, p.angle_rows - n_queries, p.score_scale, p.softcap * LOG2E,
        p.scale, p.window,
        **options,
    )  # fmt: skip


def _grad_keys(
    p: _Problem,
    rows: tuple[_Rows, _Rows, _Rows, _Rows],
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    heads, group, n_queries, n_keys = p.sizes
    tile = _tiles(p).grad_key
    strides, options = _backward_arguments(p, rows, tile)
    grad_key_kernel[(p.q.shape[0] * (heads // group), triton.cdiv(n_keys, tile.block_n))](
        *(r.data for r in rows), lse, delta, p.cos, p.sin, p.starts, p.ends, grad_k, grad_v, *strides,
        heads // group, group, n_queries, n_keys, p.angle_batch, p.angle_rows - n_keys, p.score_scale,
        p.softcap * LOG2E, p.scale,
        p.window, **options,
    )  # fmt: skip


def compile_cases() -> tuple[CompileCase, ...]:
    """Every kernel at every benchmark head dimension and target, for the ahead-of-time gate."""
    return cases()
