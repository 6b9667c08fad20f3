"""Convolution over five axes against compositions of conv3d: ours as "eager" (the reference: channels innermost, dead
outer taps skipped), torchnd
(PyPI, GPL-3.0, only if installed), and jax (if installed).

Flops: two per multiply-add of the taps that touch data (`live`), three such products per training step. Bytes: x,
weight and y once forward;
grad, x, weight read and both gradients written backward.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels._case import TensorMaker
from astrobiogen.kernels.conv_nd.geometry import live_range
from astrobiogen.kernels.conv_nd.samples import BENCHMARK_SIZES, Size
from benchmarks import peers
from benchmarks.harness import Candidate, Work
from benchmarks.runner import Bench, verified_modes

DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32,)


def live_multiplications(size: Size) -> int:
    """Multiply-adds per batch element that touch data: the last axis is circular, so all of its taps do."""
    total = size.spatial[-1] * size.kernel[-1]
    for length, taps in itertools.islice(zip(size.spatial, size.kernel), len(size.spatial) - 1):
        ranges = (live_range(length, length, 1, tap - taps // 2) for tap in range(taps))
        total *= sum(high - low for low, high in ranges)
    return total * size.channels * size.outputs


def _pad_last(x: torch.Tensor, halo: int) -> torch.Tensor:
    """The circular halo of the last axis, for peers that pad all axes with zeros (F.pad refuses 7-D circular)."""
    return torch.cat([x[..., x.shape[-1] - halo :], x, x[..., :halo]], -1) if halo else x


def torchnd(size: Size) -> Candidate:
    """torchnd 0.3.0's conv_nd behind an explicit circular halo."""
    found = peers.load("torchnd")
    if isinstance(found, str):
        return Candidate("torchnd", None, found)
    *zeros, halo = size.padding()

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(-len(size.spatial), 0))
        y = found.conv_nd(_pad_last(x, halo), weight, axes, padding=(*zeros, 0))  # takes no bias
        return y + bias.reshape(-1, *[1] * len(axes))

    return Candidate("torchnd", run)


def jax_conv(size: Size) -> Candidate:
    """jax.lax.conv_general_dilated over five spatial axes, jitted; forward only, through DLPack."""
    if importlib.util.find_spec("jax") is None:
        return Candidate("jax", None, "not installed")
    jax = peers.load("jax")
    if isinstance(jax, str):
        return Candidate("jax", None, jax)
    *zeros, halo = size.padding()
    pads = [(p, p) for p in (*zeros, 0)]
    axes = "".join(chr(ord("a") + axis) for axis in range(len(size.spatial)))
    layout = ("NC" + axes, "OI" + axes, "NC" + axes)
    conv = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1,) * len(pads), pads, dimension_numbers=layout))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        arrays = [jax.dlpack.from_dlpack(t.detach().contiguous()) for t in (_pad_last(x, halo), weight)]
        return torch.from_dlpack(conv(*arrays)) + bias.reshape(-1, *[1] * len(pads))

    return Candidate("jax", run)


def _options(size: Size) -> dict[str, Any]:
    return {"padding": size.padding(), "padding_mode": size.modes()}


def _reference(size: Size, activation: str | None = None) -> Callable[..., torch.Tensor]:
    def run(**tensors: torch.Tensor) -> torch.Tensor:
        with astrobiogen.use_kernels("reference"):
            return ops.conv_nd(**tensors, **_options(size), activation=activation)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", BENCHMARK_SIZES, ids=lambda size: size.name)
def test_conv_nd(bench: Bench, make, device: torch.device, size: Size, dtype: torch.dtype) -> None:
    maker: TensorMaker = make(dtype)
    positions, taps = math.prod(size.spatial), math.prod(size.kernel)
    x = maker.randn(1, *size.spatial, size.channels).movedim(-1, 1)
    weight = maker.randn(size.outputs, size.channels, *size.kernel) / math.sqrt(size.channels * taps)
    inputs, outputs, weights = positions * size.channels, positions * size.outputs, weight.numel()
    flops = 2 * live_multiplications(size)
    work = Work(
        (inputs + outputs + weights) * dtype.itemsize,
        (2 * outputs + 2 * inputs + 2 * weights) * dtype.itemsize,
        flops,
        2 * flops,
    )
    candidates = [torchnd(size)]
    if device.type == "cuda" or size.name == "stem":  # on the CPU jax takes minutes for the others
        candidates.append(jax_conv(size))
    rows = bench(
        op="conv_nd",
        size=size.name,
        dtype=dtype,
        arguments={"x": x, "weight": weight, "bias": maker.randn(size.outputs)},
        differentiable=("weight", "bias") if size.name == "stem" else ("x", "weight", "bias"),
        ours=lambda **tensors: ops.conv_nd(**tensors, **_options(size)),
        reference=_reference(size),
        work=work,
        peers=candidates,
    )
    assert verified_modes(rows) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_activation(bench: Bench, make, dtype: torch.dtype) -> None:
    """The stem with bias and SiLU in the same pass."""
    size = next(size for size in BENCHMARK_SIZES if size.name == "stem")
    maker: TensorMaker = make(dtype)
    moved = math.prod(size.spatial) * (size.channels + size.outputs) * dtype.itemsize
    flops = 2 * live_multiplications(size)

    def composed(**tensors: torch.Tensor) -> torch.Tensor:
        return F.silu(ops.conv_nd(**tensors, **_options(size)))

    rows = bench(
        op="conv_nd_silu",
        size=size.name,
        dtype=dtype,
        arguments={
            "x": maker.randn(1, *size.spatial, size.channels).movedim(-1, 1),
            "weight": maker.randn(size.outputs, size.channels, *size.kernel) / math.sqrt(486),
            "bias": maker.randn(size.outputs),
        },
        differentiable=("weight", "bias"),
        ours=lambda **tensors: ops.conv_nd(**tensors, **_options(size), activation="silu"),
        reference=_reference(size, "silu"),
        work=Work(moved, 3 * moved, flops, flops),
        peers=[Candidate("unfused", composed)],
    )
    assert verified_modes(rows) == {"forward", "backward"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factorised_block(bench: Bench, make, dtype: torch.dtype) -> None:
    """The factorised pair (1,1,3,3,3) + (3,1,1,1,1), each with a group norm and SiLU, in one autograd graph."""
    space, time = (next(size for size in BENCHMARK_SIZES if size.name == name) for name in ("space", "time"))
    maker: TensorMaker = make(dtype)
    channels, groups = space.outputs, 8
    arguments = {"x": maker.randn(1, *space.spatial, channels).movedim(-1, 1)}
    for size in (space, time):
        fan_in = channels * math.prod(size.kernel)
        arguments[f"{size.name}_weight"] = maker.randn(channels, channels, *size.kernel) / math.sqrt(fan_in)
        arguments |= {f"{size.name}_{name}": maker.randn(channels) for name in ("bias", "gamma", "beta")}

    def block(layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
            for size in (space, time):
                x = layer(size, x, *(tensors[f"{size.name}_{name}"] for name in ("weight", "bias", "gamma", "beta")))
            return x

        return run

    def fused(
        size: Size,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        norm: dict[str, Any] = {"norm": "group", "norm_groups": groups, "activation": "silu"}
        return ops.conv_nd_norm(x, weight, bias, gamma, beta, **norm, **_options(size))

    def composed(
        size: Size,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        with astrobiogen.use_kernels("reference"):
            z = ops.conv_nd(x, weight, bias, **_options(size))
        return F.silu(F.group_norm(z, groups, gamma, beta))

    flops = 2 * (live_multiplications(space) + live_multiplications(time))
    moved = 4 * math.prod(space.spatial) * channels * dtype.itemsize
    rows = bench(
        op="conv_nd_block",
        size="space+time",
        dtype=dtype,
        arguments=arguments,
        differentiable=tuple(arguments),
        ours=block(fused),
        reference=block(composed),
        work=Work(moved, 3 * moved, flops, 2 * flops),
    )
    assert verified_modes(rows) >= {"forward", "backward"}
