"""Convolution at random: one to five axes, any kernel, stride, dilation, groups and padding, against fp64; and the
adjoint identity."""

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels import registry
from astrobiogen.kernels.conv_nd.samples import random_case
from astrobiogen.testing._routes import route

ARGUMENTS = ("x", "weight", "bias")
OPS = ("conv_nd", "conv_transpose_nd", "conv_nd_weight_grad", "conv_nd_bias_grad")


def evaluate(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output and the gradients of a fixed upstream, as fp64."""
    leaves = {name: arguments[name].to(dtype).requires_grad_() for name in ARGUMENTS}
    y = ops.conv_nd(**{**arguments, **leaves})
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), upstream, materialize_grads=True)
    return y.detach().double(), [grad.double() for grad in grads]


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm())


@hypothesis.settings(max_examples=60)
@hypothesis.given(seed=st.integers(0, 2**31))
def test_any_geometry_against_fp64(seed: int) -> None:
    arguments = random_case(seed)
    with astrobiogen.use_kernels("reference"):
        exact = evaluate(arguments, torch.float64)
    # fp64 follows the op's own gradient formulas and the C++ composition: equal to the reference up to its last bits.
    with registry.only_ops():
        own = evaluate(arguments, torch.float64)
    for mine, right in zip((own[0], *own[1]), (exact[0], *exact[1])):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)
    for serving in (contextlib.nullcontext, registry.only_ops):
        with serving():
            y, grads = evaluate(arguments, torch.float32)
        # Inputs are rounded to fp32 first; the worst of 1,820 seeds was 1.5e-6 of (norm + 1).
        assert error(y, exact[0]) <= 1e-5 * float(exact[0].norm()) + 1e-6
        for name, grad, right in zip(ARGUMENTS, grads, exact[1]):
            assert error(grad, right) <= 1e-5 * float(right.norm()) + 1e-5, name


def is_small(arguments: dict[str, Any]) -> bool:
    """At most 150 (program, tap) pairs forward: the interpreter takes about 1 ms for one."""
    tensors = {name: arguments[name].to("meta") for name in ARGUMENTS}
    y = ops.conv_nd(**{**arguments, **tensors})
    planes = y.shape[0] * arguments["groups"] * math.prod(y.shape[2:-2])
    return planes * math.prod(arguments["weight"].shape[2:]) <= 150


# Below and above the channels per group up to which a kernel packs taps and channels together.
@pytest.mark.parametrize("inputs", [None, 17], ids=["packed", "taps"])
@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
@hypothesis.settings(max_examples=2)
@hypothesis.given(seed=st.integers(0, 2**31))
def test_any_geometry_in_triton(axes: int, inputs: int | None, seed: int) -> None:
    """Forward, adjoint, weight and bias gradient; the interpreter computes what the kernels compute, tap by tap."""
    drawn = (random_case(later, 3, axes, inputs) for later in itertools.count(seed))
    arguments = next(case for case in drawn if is_small(case))
    with astrobiogen.use_kernels("reference"):
        exact = evaluate(arguments, torch.float64)
    with route(OPS, "triton") as calls:
        y, grads = evaluate(arguments, torch.float32)
    assert set(calls) == set(OPS)
    assert error(y, exact[0]) <= 1e-5 * float(exact[0].norm()) + 1e-6
    for name, grad, right in zip(ARGUMENTS, grads, exact[1]):
        assert error(grad, right) <= 1e-5 * float(right.norm()) + 1e-5, name


def with_stride_one_channels(x: torch.Tensor) -> torch.Tensor:
    """The same values with channels innermost, also where there is one channel and its stride could be anything."""
    rows = x.movedim(1, -1).contiguous()
    return rows.as_strided(x.shape, (rows.stride(0), 1, *rows.stride()[1:-1]))


# 5251: one channel, last axis strided over to a single output; oneDNN reads other rows if strides say channels-last.
# 360: a last axis of one row whose every tap lands in the zero padding; oneDNN with a bias leaves the process.
@pytest.mark.parametrize("implementation", ["auto", "ops", "reference"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, with_stride_one_channels], ids=["plain", "channels-last"])
@pytest.mark.parametrize("seed", [5251, 360])
def test_geometries_that_onednn_gets_wrong(
    seed: int, layout: Callable[[torch.Tensor], torch.Tensor], implementation: Literal["auto", "ops", "reference"]
) -> None:
    arguments = random_case(seed)
    with astrobiogen.use_kernels("reference"):
        exact = evaluate(arguments, torch.float64)
    single = {name: layout(arguments[name].float()) for name in ("x", "weight")}
    with registry.only_ops() if implementation == "ops" else astrobiogen.use_kernels(implementation):
        y, grads = evaluate({**arguments, **single}, torch.float32)
    assert error(y, exact[0]) <= 1e-6 * float(exact[0].norm())
    for name, grad, right in zip(ARGUMENTS, grads, exact[1]):
        assert error(grad, right) <= 1e-6 * float(right.norm()), name


@hypothesis.settings(max_examples=40)
@hypothesis.given(seed=st.integers(0, 2**31))
def test_adjoint_identity(seed: int) -> None:
    arguments = {**random_case(seed), "bias": None, "activation": None}
    x, weight = arguments["x"], arguments["weight"]
    options = {name: arguments[name] for name in ("stride", "padding", "padding_mode", "dilation", "groups")}
    y = ops.conv_nd(**arguments)
    v = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    rows = zip(x.shape[2:], y.shape[2:], weight.shape[2:], options["stride"], options["padding"], options["dilation"])
    extra = [n - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for n, o, k, s, p, d in rows]
    back = ops.conv_transpose_nd(v, weight, output_padding=extra, **options)
    left, right = float((y * v).sum()), float((x * back).sum())
    assert abs(left - right) <= 1e-10 * (float(y.norm() * v.norm()) + 1.0)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    channels=st.integers(1, 5),
    outputs=st.sampled_from([8, 11, 16, 33, 40]),
    size=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    width=st.sampled_from([4, 6, 20]),
    modes=st.lists(st.sampled_from(["zeros", "circular", "reflect", "replicate", "pole"]), min_size=5, max_size=5),
)
def test_pairs_of_outputs_against_fp64(
    channels: int, outputs: int, size: list[int], width: int, modes: list[str]
) -> None:
    """Kernel 3 with padding 1, where the CPU kernels compute two outputs of an axis together, and enough outputs."""
    spatial = [*size, width]
    chosen = []
    for axis, length in enumerate(spatial):
        mode = modes[axis]
        last_or_odd = axis + 1 == len(spatial) or spatial[axis + 1] % 2 == 1
        chosen.append("zeros" if (mode == "pole" and last_or_odd) or (mode == "reflect" and length == 1) else mode)
    arguments: dict[str, Any] = {
        "x": torch.randn(2, channels, *spatial).double(),
        "weight": torch.randn(outputs, channels, *[3] * len(spatial)).double(),
        "bias": torch.randn(outputs).double(),
        "padding": 1,
        "padding_mode": tuple(chosen),
        "activation": "silu",
    }
    with astrobiogen.use_kernels("reference"):
        exact = evaluate(arguments, torch.float64)
    with registry.only_ops():
        y, grads = evaluate(arguments, torch.float32)
    assert error(y, exact[0]) <= 1e-5 * float(exact[0].norm())
    for name, grad, right in zip(ARGUMENTS, grads, exact[1]):
        assert error(grad, right) <= 1e-5 * float(right.norm()) + 1e-5, name
