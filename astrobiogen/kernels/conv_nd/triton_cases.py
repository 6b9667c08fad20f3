"""Specialisations of the convolution's Triton kernels for the ahead-of-time compile gate, through the launchers' own
arithmetic.

The last element of a case's name are its targets: `LARGE_SHARED_TARGETS` have tiles of their own in half precision.
"""

import functools
from typing import Any

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.conv_nd.geometry import GROUP, LAYER
from astrobiogen.kernels.conv_nd.samples import BENCHMARK_SIZES, Size
from astrobiogen.kernels.conv_nd.triton.launch import (
    LARGE_SHARED_TARGETS,
    Launch,
    Problem,
    adjoint_problem,
    forward_launch,
    holds_all_channels,
    weight_launch,
)
from astrobiogen.kernels.conv_nd.triton.norm import (
    group_rows_backward,
    group_sums,
    merge_tiles,
    norm_rows,
    norm_rows_backward,
    scale_rows,
)
from astrobiogen.kernels.conv_nd.triton.norm_launch import (
    GROUP_CHANNELS,
    MERGE_BLOCK,
    TILE_ELEMENTS,
    row_blocks,
    row_warps,
)
from astrobiogen.kernels.conv_nd.triton.weight import row_sums, weight_taps

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISIONS = {"fp32": "ieee", "fp32 as tf32": "tf32"}
SMALL_SHARED_TARGETS = (86, 89)
ALL_TARGETS = (80, 86, 89, 90)
# "narrow" runs the wide layer's kernels with smaller blocks.
SIZES = tuple(size for size in BENCHMARK_SIZES if size.name != "narrow")
# Layers whose fused norms are compiled too: one packed kernel, one per-tap kernel.
NORM_SIZES = ("stem", "wide")


def compile_cases() -> tuple[CompileCase, ...]:
    """Stem, wide layer and factorised pair: forward, adjoint and weight gradient in bf16, fp16 and fp32 (exact, and as
    tf32) on every target; the fused norms; the norms' own passes."""
    cases: list[CompileCase] = []
    for size in SIZES:
        for dtype in ("bf16", "fp16"):
            cases += _size_cases(size, dtype, SMALL_SHARED_TARGETS)
            cases += _size_cases(size, dtype, LARGE_SHARED_TARGETS)
        for dtype in PRECISIONS:
            cases += _size_cases(size, dtype, (80, 86, 89))
            cases += _size_cases(size, dtype, (90,))
    for dtype in ITEMSIZE:
        cases += _norm_cases(dtype)
    return tuple(cases)


def _size_cases(size: Size, dtype: str, targets: tuple[int, ...]) -> list[CompileCase]:
    geometry, out = size.geometry(), size.spatial  # every benchmark size keeps its spatial shape
    precision = PRECISIONS.get(dtype, "ieee")
    label = f"{size.name}/{dtype}/" + "-".join(str(target) for target in targets)
    dtype = dtype.split()[0]
    itemsize = ITEMSIZE[dtype]
    forward = Problem.of(1, size.spatial, out, size.kernel, geometry, (size.channels, size.outputs))
    adjoint = adjoint_problem(1, out, size.spatial, size.kernel, geometry, (size.outputs, size.channels))
    value, single = f"*{dtype}", "*fp32"
    tensors: dict[str, str] = dict.fromkeys(("x", "weight", "bias", "y", "kept", "gamma", "beta"), value)
    tensors |= {"mean": single, "rstd": single, "eps": "fp32"}
    gradient = {"x": value, "grad": value, "partial": single}
    launch_of = functools.partial(forward_launch, itemsize=itemsize, target=targets[0], precision=precision)
    launches = [
        ("forward", launch_of(forward, activation=1), tensors),
        ("adjoint", launch_of(adjoint), tensors),
        ("weight", weight_launch(forward, itemsize, targets[0], precision=precision), gradient),
    ]
    if size.name in NORM_SIZES:
        launches.append(("forward-group", launch_of(forward, norm=GROUP, keep=True), tensors))
        if holds_all_channels(forward, itemsize, targets[0]):  # else the norm is a pass of its own
            launches.append(("forward-layer", launch_of(forward, activation=1, norm=LAYER, keep=True), tensors))
    return [_case(f"{kernel}/{label}", launch, types, targets) for kernel, launch, types in launches]


def _case(name: str, launch: Launch, tensors: dict[str, str], targets: tuple[int, ...]) -> CompileCase:
    # Rows of two channels (the stem's x, its adjoint's weight) have nothing of 16 bytes to load. wgmma takes tf32
    # operands with K innermost only, so Triton transposes the weight gradient's on their way into shared memory.
    vector_loads = "packed" not in launch.kernel.__name__ and launch.constants["NG"] >= 8
    if launch.kernel is weight_taps and launch.constants["PRECISION"] == "tf32" and targets == (90,):
        vector_loads = False
    pointers = [key for key, kind in tensors.items() if kind.startswith("*")]
    return CompileCase(
        name=name,
        kernel=launch.kernel,
        signature={**tensors, **dict.fromkeys(launch.integers, "i32")},
        constexprs=launch.constants,
        aligned=(*pointers, *(key for key, value in launch.integers.items() if value % 16 == 0)),
        num_warps=launch.warps,
        num_stages=launch.stages,
        needs_mma=tensors["x"] != "*fp32" or launch.constants["PRECISION"] == "tf32",
        needs_vector_loads=vector_loads,
        targets=targets,
    )


def _norm_cases(dtype: str, channels: int = 128, groups: int = 8) -> list[CompileCase]:
    """The norms' own kernels, SiLU."""
    value, single = f"*{dtype}", "*fp32"
    block_c, block_r = row_blocks(channels)
    tile = {"C": channels, "ACTIVATION": 1, "BLOCK_R": block_r, "BLOCK_C": block_c}
    group_c = min(GROUP_CHANNELS, block_c)
    group: dict[str, Any] = {**tile, "BLOCK_R": TILE_ELEMENTS // group_c, "BLOCK_C": group_c}
    merge = {"C": channels, "GROUPS": groups, "TILE_ROWS": 64, "BLOCK": MERGE_BLOCK}
    affine, statistics = {"gamma": value, "beta": value}, {"mean": single, "rstd": single}
    pair, gradients = {"z": value, "y": value}, {"grad": value, "z": value}
    rows, positions = {"ROWS": "i32"}, {"POSITIONS": "i32"}
    sizes = dict.fromkeys(("TILES", "SPLITS", "PLANE", "PLANE_TILES"), "i32")
    means = {"grad_mean": single, "grad_projection": single}
    cases: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
        ("norm", norm_rows, {**pair, **affine, **statistics, **rows, "eps": "fp32"},
         {**tile, "NORM": LAYER, "KEEP": True}),
        ("norm-backward", norm_rows_backward,
         {**gradients, "grad_z": value, **affine, **statistics, "partial": single, **rows},
         {**tile, "NORM": LAYER}),
        ("group-scale", scale_rows, {**pair, "center": single, "scale": single, "shift": single, **positions}, group),
        ("group-sums", group_sums,
         {**gradients, **affine, **statistics, "partial": single, **positions, "SPLITS": "i32"}, group),
        ("group-backward", group_rows_backward,
         {**gradients, "grad_z": value, **affine, **statistics, **means, **positions}, group),
    ]  # fmt: skip
    cases.append(
        ("bias", row_sums, {"grad": value, "partial": single, **rows},
         {name: group[name] for name in ("C", "BLOCK_R", "BLOCK_C")})
    )  # fmt: skip
    if dtype == "fp32":  # the same for every dtype
        cases.append(
            ("group-merge", merge_tiles, {**dict.fromkeys(("center", "squares", "merged"), single), **sizes}, merge)
        )
    return [
        CompileCase(
            name=f"{name}/{channels}/{dtype}",
            kernel=kernel,
            signature=signature,
            constexprs=constants,
            aligned=tuple(key for key, kind in signature.items() if kind.startswith("*")),
            num_warps=row_warps(block_c),
            num_stages=2,
            needs_vector_loads=name != "group-merge",  # a group's 16 channels of a tile, then the next tile's
            targets=ALL_TARGETS,
        )
        for name, kernel, signature, constants in cases
    ]
