"""Specialisations of the attention kernels for the ahead-of-time gate."""

import dataclasses
import itertools
from typing import Any

from astrobiogen.kernels._case import CompileCase
from astrobiogen.kernels.attention import triton_config
from astrobiogen.kernels.attention.samples import GATE_DIMS
from astrobiogen.kernels.attention.triton_backward import delta_kernel, grad_key_kernel, grad_query_kernel
from astrobiogen.kernels.attention.triton_config import Tile
from astrobiogen.kernels.attention.triton_forward import combine_kernel, decode_kernel, forward_kernel, pack_kernel

_PLAIN = {"CAUSAL": True, "WINDOW": False, "PACKED": False, "SOFTCAP": False, "SINKS": False}
_ALL = {"CAUSAL": True, "WINDOW": True, "PACKED": True, "SOFTCAP": True, "SINKS": True}
_FLOATS = ("scale", "softcap", "out_scale")


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the launcher derives from one head dimension and dtype."""

    target: int
    dim: int
    dtype: str
    switches: dict[str, bool]

    @property
    def label(self) -> str:
        return f"{self.dim}/{self.dtype}" + ("/window,packed,softcap,sinks" if self.switches["WINDOW"] else "")

    @property
    def aligned_rows(self) -> bool:
        return self.dim * 2 % 16 == 0

    @property
    def constexprs(self) -> dict[str, Any]:
        main, tail = triton_config.cut_head(self.dim)
        width, own = main + tail, self.dim if self.aligned_rows else main + tail
        head = {"DIM": self.dim, "MAIN": main, "TAIL": tail, "ROTARY": self.dim // 2, "INTERLEAVED": False}
        widths = {"Q_WIDTH": width, "K_WIDTH": width, "V_WIDTH": own, "G_WIDTH": own, "WIDTH": width}
        return head | widths | self.switches | {"PRECISION": "tf32", "GRAD_LSE": False}

    def case(
        self, name: str, kernel: Any, tile: Tile, *, mma: bool = True, wide: bool = True, **more: int
    ) -> CompileCase:
        """The case of `kernel`: pointers by their names, tile sizes by the kernel's own argument names."""
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_G": tile.block_m, **more}
        constexprs = {n: v for n, v in (self.constexprs | sizes).items() if n in kernel.arg_names}
        rest = [n for n in kernel.arg_names if n not in constexprs]
        signature = {n: self._type(n) for n in rest}
        # Rows are packed, and with the benchmarks' head counts every stride is a multiple of 16 elements.
        strides = [n for n in rest if n.endswith(("_batch", "_token", "_head")) and n != "angle_batch"]
        aligned = (*(n for n in rest if signature[n].startswith("*")), *strides)
        return CompileCase(
            f"{name}/{self.label}",
            kernel,
            signature,
            constexprs,
            aligned,
            tile.warps,
            tile.stages,
            needs_mma=mma,
            needs_vector_loads=wide,
            targets=(self.target,),
        )

    def _type(self, name: str) -> str:
        if name in ("q", "k", "v", "x", "out", "grad", "sinks", "grad_q", "grad_k", "grad_v"):
            return f"*{self.dtype}"
        if name in ("cos", "sin", "lse", "delta", "grad_lse", "partial", "partial_top", "partial_total"):
            return "*fp32"
        if name in ("starts", "ends"):
            return "*i32" if self.switches["PACKED"] else f"*{self.dtype}"
        return "fp32" if name in _FLOATS else "i32"


def cases() -> tuple[CompileCase, ...]:
    """The three main kernels at the gate's head dimensions, causal with half rotation; at 68 also fp16, all kernels,
    and window, soft-cap, sinks and packed sequences together.
    """
    found: list[CompileCase] = []
    for target, dim in itertools.product(triton_config.TILES, GATE_DIMS):
        found += _main(_Shape(target, dim, "bf16", _PLAIN))
    for target in triton_config.TILES:
        found += _main(_Shape(target, 68, "bf16", _ALL))
        found.append(_main(_Shape(target, 68, "fp16", _PLAIN))[0])
        found += _helpers(_Shape(target, 68, "bf16", _PLAIN))
    return tuple(found)


def _main(shape: _Shape) -> list[CompileCase]:
    width = sum(triton_config.cut_head(shape.dim))
    entry = next(tiles for widest, tiles in triton_config.TILES[shape.target] if width <= widest)
    return [
        shape.case("forward", forward_kernel, entry.forward),
        shape.case("grad_query", grad_query_kernel, entry.grad_query),
        shape.case("grad_key", grad_key_kernel, entry.grad_key),
    ]


def _helpers(shape: _Shape) -> list[CompileCase]:
    main, tail = triton_config.cut_head(shape.dim)
    columns = 1 << (main + tail - 1).bit_length()
    simple, single = Tile(0, 0, triton_config.PACK_WARPS, 1), Tile(0, 0, 1, 1)
    # Rows of 68 columns of 2 bytes start at multiples of 8 bytes: no 16-byte loads there.
    return [
        shape.case("pack", pack_kernel, simple, mma=False, wide=False, BLOCK=triton_config.PACK_ROWS),
        shape.case(
            "delta", delta_kernel, simple, mma=False, wide=False, COLUMNS=columns, BLOCK=triton_config.DELTA_ROWS
        ),
        shape.case("decode", decode_kernel, triton_config.DECODE_TILE),
        shape.case("combine", combine_kernel, single, mma=False, wide=False, COLUMNS=columns),
    ]
