"""Inputs that attention must handle, and the sizes worth timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.cases import Case, TensorMaker


@dataclasses.dataclass(frozen=True)
class Size:
    """A problem worth timing: batch 1 unless said, causal, rotary over the whole head."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    queries: int | None = None  # None: as many as tokens; 1: decode
    batch: int = 1


# 68 columns per head are those of the flagship model (4352 / 64). The first is the `--quick` one.
BENCHMARK_SIZES = (Size(512, 16, 4, 68), Size(2048, 16, 4, 68), Size(2048, 16, 4, 64), Size(2048, 16, 4, 68, queries=1))
GPU_BENCHMARK_SIZES = (
    Size(2048, 64, 8, 68),
    Size(4096, 64, 8, 68),
    Size(16384, 64, 8, 68),
    Size(4096, 32, 8, 64),
    Size(4096, 32, 8, 128),
)
GATE_DIMS = (64, 68, 80, 96, 128, 160, 256)
# Every head dimension that the tests run end to end on the CPU.
HEAD_DIMS = (8, 16, 40, 64, 67, 68, 72, 80, 96, 100, 128, 160, 256)


def tensors(
    make: TensorMaker, batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int
) -> dict[str, Any]:
    """q, k, v of one problem."""
    return {
        "q": make.randn(batch, queries, heads, dim),
        "k": make.randn(batch, keys, kv_heads, dim),
        "v": make.randn(batch, keys, kv_heads, dim),
    }


def angles(make: TensorMaker, *shape: int) -> dict[str, torch.Tensor]:
    """Rotary tables of random angles; fp32 or wider, as the layers keep them."""
    dtype = torch.float64 if make.dtype == torch.float64 else torch.float32
    angle = make.randn(*shape, dtype=torch.float64) * 3
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def plain(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int, rotary: int = 0, **options: Any):
    """Builder of a case: tensors, rotary tables of `rotary` pairs if any, and `options` as they are."""

    def build(make: TensorMaker) -> dict[str, Any]:
        arguments = tensors(make, batch, queries, keys, heads, kv_heads, dim)
        if rotary:
            arguments |= angles(make, max(queries, keys), rotary)
        return arguments | options

    return build


def _rotary_per_batch(make: TensorMaker) -> dict[str, Any]:
    return tensors(make, 2, 9, 9, 1, 1, 10) | angles(make, 2, 9, 3) | {"interleaved": True}


def _everything(make: TensorMaker) -> dict[str, Any]:
    arguments = tensors(make, 1, 3, 4, 2, 1, 5) | angles(make, 4, 2)
    return arguments | {"sinks": make.randn(2), "window": 3, "softcap": 2.0, "return_lse": True}


def _packed(make: TensorMaker) -> dict[str, Any]:
    bounds = torch.tensor([0, 3, 3, 22, 37], device=make.device)
    return tensors(make, 1, 40, 40, 2, 1, 12) | angles(make, 40, 6) | {"cu_seqlens": bounds, "return_lse": True}


def _packed_window(make: TensorMaker) -> dict[str, Any]:
    bounds = torch.tensor([0, 18, 40], dtype=torch.int32, device=make.device)
    return tensors(make, 1, 40, 40, 1, 1, 8) | {"cu_seqlens": bounds, "window": 4, "causal": False}


def _sinks(make: TensorMaker) -> dict[str, Any]:
    return tensors(make, 1, 5, 19, 2, 1, 16) | {"sinks": make.randn(2), "return_lse": True}


def _decode_sinks(make: TensorMaker) -> dict[str, Any]:
    return (
        tensors(make, 1, 1, 40, 3, 1, 20)
        | angles(make, 40, 5)
        | {"sinks": make.randn(3), "window": 30, "return_lse": True}
    )


def _heads_first(make: TensorMaker) -> dict[str, Any]:
    # what `x.view(B, H, S, D).transpose(1, 2)` gives
    return {
        "q": make.randn(2, 4, 18, 24).transpose(1, 2),
        "k": make.randn(2, 2, 18, 24).transpose(1, 2),
        "v": make.randn(2, 2, 24, 18).permute(0, 3, 1, 2),
    }


def _decode_heads_first(make: TensorMaker) -> dict[str, Any]:
    # a cache [B, H, S, D], as SDPA takes it
    return {
        "q": make.randn(1, 2, 8, 64),
        "k": make.randn(1, 2, 700, 64).transpose(1, 2),
        "v": make.randn(1, 2, 700, 64).transpose(1, 2),
        "return_lse": True,
    }


def _fused_projection(make: TensorMaker) -> dict[str, Any]:
    # q, k, v as slices of one projection: rows of 68 columns at 2-byte-odd starts
    fused = make.randn(1, 9, 4, 69)[..., 1:]
    return {"q": fused[:, :, :2], "k": fused[:, :, 2:3], "v": fused[:, :, 3:]} | angles(make, 9, 34)


def _expanded(make: TensorMaker) -> dict[str, Any]:
    # one row of queries for the whole batch, one key head stretched over two
    return {
        "q": make.randn(1, 6, 2, 16).expand(2, 6, 2, 16),
        "k": make.randn(2, 6, 1, 16).expand(2, 6, 2, 16),
        "v": make.randn(2, 6, 1, 16).expand(2, 6, 2, 16),
    }


def _with_sinks(build: Callable[[TensorMaker], dict[str, Any]]):
    def with_sinks(make: TensorMaker) -> dict[str, Any]:
        return build(make) | {"sinks": make.randn(2)}

    return with_sinks


def _short_sequences(make: TensorMaker) -> dict[str, Any]:
    # none of one token, and two tokens behind the last
    bounds = torch.tensor([0, 3, 3, 5, 16], device=make.device)
    return tensors(make, 1, 18, 18, 2, 1, 4) | {"cu_seqlens": bounds, "causal": False, "return_lse": True}


def _peaked(factor: float, build: Callable[[TensorMaker], dict[str, Any]]):
    """Scores `factor` times as large: nearly all of a row's weight is on one key."""

    def peaked(make: TensorMaker) -> dict[str, Any]:
        arguments = build(make)
        return arguments | {"q": arguments["q"] * factor}

    return peaked


_GRADS = ("q", "k", "v")
_ALL_GRADS = (*_GRADS, "sinks")

CASES = (
    Case("gradcheck", plain(1, 3, 3, 2, 1, 6, rotary=2), _GRADS, gradcheck=True),
    Case("everything", _everything, (*_GRADS, "sinks"), gradcheck=True),
    Case("one_token", plain(1, 1, 1, 1, 1, 1), _GRADS, gradcheck=True),
    Case("no_batch", plain(0, 4, 4, 2, 1, 8), _GRADS),
    Case("no_query", plain(2, 0, 4, 2, 1, 8), _GRADS),
    Case("no_key", plain(1, 4, 0, 2, 1, 8, return_lse=True), _GRADS),
    Case("flagship", plain(1, 35, 35, 2, 1, 68, rotary=34), _GRADS),
    Case("odd_dim", plain(1, 3, 17, 2, 1, 67, rotary=33, return_lse=True), _GRADS),
    Case("interleaved", plain(1, 17, 17, 1, 1, 40, rotary=20, interleaved=True), _GRADS),
    Case("partial_tail", plain(1, 5, 5, 2, 1, 24, rotary=9), _GRADS),
    Case("full", plain(1, 17, 35, 1, 1, 16, causal=False), _GRADS),
    Case("rows_without_keys", plain(1, 21, 4, 1, 1, 8, return_lse=True), _GRADS),
    Case("window", plain(1, 40, 40, 1, 1, 8, window=7), _GRADS),
    Case("window_one", plain(1, 18, 20, 1, 1, 8, window=1, causal=False), ("v",)),
    Case("softcap", plain(1, 18, 18, 2, 1, 16, softcap=1.5, scale=1.0, return_lse=True), _GRADS),
    Case("rotary_per_batch", _rotary_per_batch, _GRADS),
    Case("packed", _packed, _GRADS),
    Case("packed_window", _packed_window, _GRADS),
    Case("sinks", _sinks, (*_GRADS, "sinks")),
    Case("decode", plain(1, 1, 50, 2, 1, 68, rotary=34), _GRADS),
    Case("decode_sinks", _decode_sinks, (*_GRADS, "sinks")),
    Case("heads_first", _heads_first, _GRADS, interpret=False),
    Case("fused_projection", _fused_projection, _GRADS),
    Case("expanded", _expanded, _GRADS),
    Case("masks_packed", _short_sequences, _GRADS, masks=True),
    Case("masks_packed_causal", _with_sinks(_packed), _ALL_GRADS, interpret=False, masks=True),
    Case("masks_window", _with_sinks(plain(1, 18, 20, 2, 1, 5, window=4)), _ALL_GRADS, masks=True),
    Case("masks_blind", _with_sinks(plain(1, 21, 6, 2, 1, 5, rotary=2)), _ALL_GRADS, interpret=False, masks=True),
    Case("masks_few", _with_sinks(plain(1, 3, 35, 2, 1, 5, window=9, softcap=2.0)), _ALL_GRADS, masks=True),
    Case("group_64", plain(1, 5, 6, 64, 1, 8), _GRADS, interpret=False),
    Case("several_tiles", plain(1, 130, 130, 4, 1, 68, rotary=34), _GRADS, interpret=False),
)

# Without a gradient: few rows (queries times heads per key/value head) have kernels of their own. Chunks of keys that
# are merged, rows that fill no block, columns that are read in place and those that are not.
FEW = (
    Case("few_chunks", plain(1, 1, 600, 8, 2, 64, return_lse=True), (), interpret=False),
    Case("few_heads_first", _decode_heads_first, (), interpret=False),
    Case("few_one_row", plain(2, 1, 300, 3, 3, 64), (), interpret=False),
    Case("few_two_rows", plain(1, 2, 150, 2, 2, 32, return_lse=True), (), interpret=False),
    Case("few_three_rows", plain(1, 3, 77, 2, 2, 16), (), interpret=False),
    Case("few_window", plain(1, 4, 600, 8, 2, 128, window=300, return_lse=True), (), interpret=False),
    Case("few_full", plain(1, 3, 200, 4, 1, 96, causal=False), (), interpret=False),
    Case("few_rotary", plain(2, 3, 200, 4, 2, 68, rotary=34, softcap=2.0, return_lse=True), (), interpret=False),
    Case("few_wide", plain(1, 2, 70, 2, 1, 256, rotary=20, interleaved=True), (), interpret=False),
    Case("few_sinks", _with_sinks(plain(1, 2, 530, 2, 1, 80, window=400, return_lse=True)), (), interpret=False),
    Case("few_peaked", _peaked(50, plain(1, 4, 300, 4, 2, 64)), (), interpret=False),
)

# Nearly all of a row's weight on one key, where dP - delta cancels and where the log-sum-exp is large, so that its
# rounding changes all probabilities that are recomputed from it.
PEAKED = (
    Case("peaked", _peaked(50, plain(1, 35, 35, 4, 2, 68, rotary=34)), _GRADS),
    Case("peaked_softcap", _peaked(50, plain(1, 20, 20, 2, 1, 16, softcap=40.0)), _GRADS),
    Case("peaked_sinks", _with_sinks(_peaked(50, plain(1, 20, 33, 2, 1, 40, window=9))), _ALL_GRADS),
    Case("peaked_packed", _peaked(50, _packed), _GRADS),
    Case("peaked_few", _peaked(50, plain(1, 5, 18, 2, 1, 16)), _GRADS),
    Case("half_peaked", _peaked(8, plain(1, 35, 35, 2, 1, 24)), _GRADS),
)
