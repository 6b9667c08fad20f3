"""Convolution over five axes against compositions of conv3d: ours; "eager", the reference of this package (channels
innermost, dead outer taps skipped: the composition called a7 in the op's README); torchnd 0.3.0 (PyPI, GPL-3.0, only if
installed); jax (if installed).

Flops: two per multiply-add of the taps that touch data (`live`), three such products per training step. Bytes: x,
weight and y once forward; grad, x, weight read and both gradients written backward.

Calls of seconds get few rounds. jax, with seconds to minutes per call, is timed once and with a warm heap only, and
left out where a call takes more than half a minute.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels.cases import TensorMaker
from astrobiogen.kernels.conv_nd.geometry import live_range
from astrobiogen.kernels.conv_nd.op import Activation
from astrobiogen.kernels.conv_nd.samples import BENCHMARK_SIZES, Size
from benchmarks import peers
from benchmarks.harness import Candidate, Work
from benchmarks.runner import Bench, verified_modes

# Why jax 0.10.2's forward or backward is left out: more than half a minute per call, one thread of a 2-core AMD EPYC.
JAX_TAKES = {
    "stem": ("", "34 s per call, tried once"),
    "narrow": ("", "37 s per call, tried once"),
    "wide": ("its forward takes 72 s per call, tried once", ""),
}
# The reference makes the same conv3d calls compiled or not.
SAME_CALLS = "the same conv3d calls as eager: 1.06x and 1.07x on the space layer"
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

    # The gradient of narrow's weight, over 245,760 positions, is 16 times as far off as eager's: 5e-5 of the largest.
    rounds = 0 if torch.cuda.is_available() else {"stem": 2, "narrow": 2, "wide": 1}.get(size.name, 0)
    return Candidate("torchnd", run, rounds=rounds, slack=8.0)


def jax_conv(size: Size, device: torch.device, warm: bool) -> Candidate:
    """jax.lax.conv_general_dilated over five spatial axes and its VJP, jitted, through DLPack."""
    with _affinity(torch.get_num_threads()):  # jax makes as many threads as there are processors for it; no flag helps
        found = peers.load("jax")
        if isinstance(found, str):
            return Candidate("jax", None, found)
        found.devices()
    if device.type == "cpu" and not warm:
        return Candidate("jax", None, "page faults are below 2 % of its seconds: see the warm heap")
    if device.type == "cpu" and size.name == "narrow" and torch.get_num_threads() > 1:
        return Candidate("jax", None, "12 s of processor time per call at any number of threads: see one")
    forward, backward = JAX_TAKES.get(size.name, ("", "")) if device.type == "cpu" else ("", "")
    if forward:
        return Candidate("jax", None, forward)
    return Candidate("jax", _jax_function(found, size), rounds=1, forward_only=backward)


@contextlib.contextmanager
def _affinity(processors: int) -> Iterator[None]:
    """At most so many processors for this thread and the threads that it starts meanwhile; Linux only."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:processors])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _jax_function(jax: Any, size: Size) -> Callable[..., torch.Tensor]:
    *zeros, halo = size.padding()
    pads = [(p, p) for p in (*zeros, 0)]
    axes = "".join(chr(ord("a") + axis) for axis in range(len(size.spatial)))
    layout = ("NC" + axes, "OI" + axes, "NC" + axes)

    def conv(x: Any, weight: Any) -> Any:
        return jax.lax.conv_general_dilated(x, weight, (1,) * len(pads), pads, dimension_numbers=layout)

    def vjp(x: Any, weight: Any, grad: Any) -> tuple[Any, ...]:
        return jax.vjp(conv, x, weight)[1](grad)

    def weight_vjp(x: Any, weight: Any, grad: Any) -> Any:
        return jax.vjp(lambda w: conv(x, w), weight)[1](grad)[0]

    forward, both, weight_only = (jax.jit(function) for function in (conv, vjp, weight_vjp))

    def arrays(*tensors: torch.Tensor) -> list[Any]:
        return [jax.dlpack.from_dlpack(tensor.detach().contiguous()) for tensor in tensors]

    class JaxConv(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return torch.from_dlpack(jax.block_until_ready(forward(*arrays(x, weight))))

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            inputs = arrays(*ctx.saved_tensors, *grads)
            if not ctx.needs_input_grad[0]:
                return None, torch.from_dlpack(jax.block_until_ready(weight_only(*inputs)))
            return tuple(torch.from_dlpack(grad) for grad in jax.block_until_ready(both(*inputs)))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = JaxConv.apply(_pad_last(x, halo), weight)
        return y + bias.reshape(-1, *[1] * len(pads))

    return run


def _options(size: Size) -> dict[str, Any]:
    return {"padding": size.padding(), "padding_mode": size.modes()}


def _reference(size: Size, activation: Activation = None) -> Callable[..., torch.Tensor]:
    def run(**tensors: torch.Tensor) -> torch.Tensor:
        with astrobiogen.use_kernels("reference"):
            return ops.conv_nd(**tensors, **_options(size), activation=activation)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", BENCHMARK_SIZES, ids=lambda size: size.name)
def test_conv_nd(
    bench: Bench, make, device: torch.device, pytestconfig: pytest.Config, size: Size, dtype: torch.dtype
) -> None:
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
    dense = device.type == "cpu" and size.name in JAX_TAKES
    if dense and not bench.quick:
        bench.settings = dataclasses.replace(bench.settings, rounds=3, least_rounds=3, warmup=1)
    warm = not pytestconfig.getoption("--fresh-pages")
    rows = bench(
        op="conv_nd",
        size=size.name,
        dtype=dtype,
        arguments={"x": x, "weight": weight, "bias": maker.randn(size.outputs)},
        differentiable=("weight", "bias") if size.name == "stem" else ("x", "weight", "bias"),
        ours=lambda **tensors: ops.conv_nd(**tensors, **_options(size)),
        reference=_reference(size),
        work=work,
        peers=[torchnd(size), jax_conv(size, device, warm)],
        without_compile=SAME_CALLS if dense else "",
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
