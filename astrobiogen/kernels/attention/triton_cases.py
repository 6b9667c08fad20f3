"""Specialisations of the attention kernels for the ahead-of-time gate."""

import itertools
from typing import Any

from astrobiogen.kernels._case import CompileCase
from astrobiogen.kernels.attention import triton_config
from astrobiogen.kernels.attention.samples import GATE_DIMS
from astrobiogen.kernels.attention.triton_backward import delta_kernel, grad_key_kernel, grad_query_kernel
from astrobiogen.kernels.attention.triton_forward import combine_kernel, decode_kernel, forward_kernel, pack_kernel

_STRIDES = tuple(f"{name}_{axis}" for name in "qkv" for axis in ("batch", "token", "head"))
_GRAD_STRIDES = tuple(f"g_{axis}" for axis in ("batch", "token", "head"))


def cases() -> tuple[CompileCase, ...]:
    """All kernels at the gate's head dimensions, causal with half rotation; window, softcap, sinks and packing at
    68.
    """
    found: list[CompileCase] = []
    for target, dim in itertools.product(triton_config.TILES, GATE_DIMS):
        found += _case_set(target, dim, "bf16", f"{dim}/bf16", {})
    for target in triton_config.TILES:
        found += _case_set(target, 68, "fp16", "68/fp16", {})[:1]
        full = {"WINDOW": True, "SOFTCAP": True, "PACKED": True, "SINKS": True}
        found += _case_set(target, 68, "bf16", "68/bf16/window,softcap,packed,sinks", full)
    return tuple(found)


def _case_set(target: int, dim: int, dtype: str, label: str, switches: dict[str, bool]) -> list[CompileCase]:
    main, tail = triton_config.cut_head(dim)
    width = main + tail
    entry = next(tiles for widest, tiles in triton_config.TILES[target] if width <= widest)
    aligned_head = dim * 2 % 16 == 0
    head = {"DIM": dim, "MAIN": main, "TAIL": tail, "ROTARY": dim // 2, "INTERLEAVED": False}
    masks = {"CAUSAL": True, "WINDOW": False, "PACKED": False} | {
        k: v for k, v in switches.items() if k in ("WINDOW", "PACKED")
    }
    value_width = dim if aligned_head else width
    options = (
        head
        | masks
        | {"K_WIDTH": width, "V_WIDTH": value_width, "SOFTCAP": switches.get("SOFTCAP", False), "PRECISION": "tf32"}
    )
    data, stats, index = f"*{dtype}", "*fp32", "*i32" if masks["PACKED"] else f"*{dtype}"
    common = {"q": data, "k": data, "v": data, "cos": stats, "sin": stats, "starts": index, "ends": index}

    def build(
        name: str,
        kernel: Any,
        pointers: dict[str, str],
        constexprs: dict[str, Any],
        tile: triton_config.Tile,
        mma: bool = True,
    ):
        signature = {n: pointers[n] for n in kernel.arg_names if n in pointers}
        signature |= {n: _scalar(n) for n in kernel.arg_names if n not in pointers and n not in constexprs}
        used = {n: v for n, v in constexprs.items() if n in kernel.arg_names}
        # The packed rows and, at these head counts, all strides are multiples of 16 elements.
        aligned = (
            *pointers,
            *(n for n in signature if n.endswith(("_batch", "_token", "_head")) and n != "angle_batch"),
        )
        wide = name not in ("pack", "delta", "combine") or aligned_head
        return CompileCase(
            f"{name}/{label}", kernel, signature, used, tuple(n for n in aligned if n in signature), tile.warps,
            tile.stages,
            needs_mma=mma, needs_vector_loads=wide and name != "combine" and name != "pack", targets=(target,),
        )  # fmt: skip

    simple = triton_config.Tile(0, 0, triton_config.PACK_WARPS, 1)
    forward, query, key = entry.forward, entry.grad_query, entry.grad_key
    gradients = {"grad": data, "lse": stats, "delta": stats}
    widths = {"Q_WIDTH": width, "G_WIDTH": value_width}
    blocks = lambda tile: {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}  # noqa: E731
    decode = triton_config.DECODE_TILE
    partial = {"partial": stats, "partial_top": stats, "partial_total": stats}
    found = [
        build("forward", forward_kernel, common | {"sinks": data, "out": data, "lse": stats},
        options | blocks(forward) | {"SINKS": switches.get("SINKS", False)}, forward),
        build("grad_query", grad_query_kernel, common | gradients | {"grad_q": data},
        options | widths | blocks(query), query),
        build("grad_key", grad_key_kernel, common | gradients | {"grad_k": data, "grad_v": data},
        options | widths | blocks(key), key),
    ]  # fmt: skip
    if switches or dim != 68:
        return found
    return found + [
        build("pack", pack_kernel, {"x": data, "cos": stats, "sin": stats, "out": data},
        head | {"BLOCK": triton_config.PACK_ROWS}, simple, False),
        build("delta", delta_kernel, {"grad": data, "out": data, "grad_lse": stats, "delta": stats}, {"DIM": dim,
        "COLUMNS": 1 << (dim - 1).bit_length(), "GRAD_LSE": False, "BLOCK": triton_config.DELTA_ROWS}, simple, False),
        build("decode", decode_kernel, common | partial, options | {"BLOCK_G": decode.block_m,
        "BLOCK_N": decode.block_n}, decode),
        build("combine", combine_kernel, partial | {"sinks": data, "out": data, "lse": stats}, {"DIM": dim,
        "WIDTH": width, "COLUMNS": 1 << (width - 1).bit_length(), "SINKS": False}, triton_config.Tile(0, 0, 1, 1),
        False),
    ]  # fmt: skip


def _scalar(name: str) -> str:
    return "fp32" if name in ("scale", "softcap", "out_scale") else "i32"
