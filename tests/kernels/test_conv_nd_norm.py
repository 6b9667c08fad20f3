"""Convolution with norm and activation: the three norms against fp64, on the CPU, and the layer."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import astrobiogen
from astrobiogen import layers, ops
from astrobiogen.kernels.conv_nd.samples import (
    LONG_NORM_OFFSETS,
    LONG_NORM_SHAPES,
    NORM_GROUPS,
    NORM_SHAPES,
    norm_case,
)
from astrobiogen.testing import check_battery, check_op
from astrobiogen.testing._routes import route

OPS = (
    "conv_nd_norm",
    "conv_nd_norm_backward",
    "conv_nd",
    "conv_transpose_nd",
    "conv_nd_weight_grad",
    "conv_nd_bias_grad",
)


def reference(**arguments: Any) -> torch.Tensor:
    with astrobiogen.use_kernels("reference"):
        return ops.conv_nd_norm(**arguments)


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
def test_battery(norm: str) -> None:
    small = dataclasses.replace(norm_case(norm, 2, 6, (2, 3), 2), gradcheck=True)
    check_battery(ops.conv_nd_norm, reference, small, ops=OPS, implementations=("cpu",))


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
@pytest.mark.parametrize(("channels", "outputs", "spatial", "batch"), NORM_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(
    norm: str, channels: int, outputs: int, spatial: tuple[int, ...], batch: int, dtype: torch.dtype
) -> None:
    check_op(ops.conv_nd_norm, reference, norm_case(norm, channels, outputs, spatial, batch), dtype, ops=OPS)


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
@pytest.mark.parametrize("shape", LONG_NORM_SHAPES)
@pytest.mark.parametrize("offset", LONG_NORM_OFFSETS)
def test_many_positions_and_large_means(norm: str, shape: tuple[int, int, tuple[int, ...], int], offset: float) -> None:
    case = norm_case(norm, *shape, offset=offset)
    assert check_op(ops.conv_nd_norm, reference, case, torch.float32, ops=OPS)


# Packed and per-tap kernels with the norm in their epilogue; 66 fp32 channels pass the 64 of a tile, so a channel norm
# takes a pass of its own; empty batch.
TRITON_SHAPES = [
    (2, 12, (2, 3, 4), 2, torch.float32),
    (17, 18, (2, 3), 1, torch.float32),
    (2, 66, (5,), 2, torch.float32),
    (2, 12, (3, 4), 0, torch.float32),
    (17, 18, (2, 3), 1, torch.bfloat16),
    (17, 18, (2, 3), 1, torch.float16),
]


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
@pytest.mark.parametrize(("channels", "outputs", "spatial", "batch", "dtype"), TRITON_SHAPES)
def test_in_triton(
    norm: str, channels: int, outputs: int, spatial: tuple[int, ...], batch: int, dtype: torch.dtype
) -> None:
    one = norm_case(norm, channels, outputs, spatial, batch)
    if dtype == torch.float32:
        large = norm_case(norm, channels, outputs, spatial, batch, offset=1000.0)
        assert check_op(ops.conv_nd_norm, reference, large, dtype, ops=OPS, implementation="triton")
    assert check_op(ops.conv_nd_norm, reference, one, dtype, ops=OPS, implementation="triton")


@pytest.mark.parametrize("kept", [True, False])
def test_group_statistics_of_many_tiles_in_triton(kept: bool) -> None:
    """Planes of several position tiles with a short last one, a mean far above the deviation."""
    x, weight = torch.randn(2, 2, 3, 11, 13), torch.randn(6, 2, 1, 1, 1)
    bias = torch.full((6,), 100.0).requires_grad_(kept)
    arguments = {"x": x, "weight": weight, "bias": bias, "norm": "group", "norm_groups": 2}
    with torch.no_grad() if not kept else torch.enable_grad():
        with route(OPS, "triton") as calls:
            y = ops.conv_nd_norm(**arguments)
        exact = reference(**{name: v.double() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()})
    assert calls == ["conv_nd_norm"]
    # z is about 100 +- 1 and has 24 bits: 100 * 2^-24 of rounding against a deviation of about 1.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gradients_in_fp64(norm: str, activation: str) -> None:
    check_op(ops.conv_nd_norm, reference, norm_case(norm, 2, 9, (2, 3), 2, activation), torch.float64, ops=OPS)


@pytest.mark.parametrize("norm", list(NORM_GROUPS))
def test_equals_pytorchs_modules(norm: str) -> None:
    layer = layers.ConvNormAct(3, 4, 12, 3, norm=norm, norm_groups=NORM_GROUPS[norm], padding=1).double()
    with torch.no_grad():
        for parameter in layer.norm.parameters():
            parameter.normal_()
    x = torch.randn(2, 4, 3, 4, 5).double()
    conv = nn.Conv3d(4, 12, 3, padding=1).double()
    conv.load_state_dict(layer.conv.state_dict())
    z = conv(x)
    weight = layer.norm.weight
    if norm == "rms":
        u = F.rms_norm(z.movedim(1, -1), (12,), weight, 1e-5).movedim(-1, 1)
    elif norm == "layer":
        u = F.layer_norm(z.movedim(1, -1), (12,), weight, layer.norm.bias, 1e-5).movedim(-1, 1)
    else:
        u = F.group_norm(z, NORM_GROUPS[norm], weight, layer.norm.bias, 1e-5)
    torch.testing.assert_close(layer(x), F.silu(u))


def test_layer_under_autocast() -> None:
    layer = layers.ConvNormAct(5, 2, 16, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 2, 2, 1, 3, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm must be one of"),
        ({"norm": "group", "norm_groups": 5}, "norm_groups = 5 must divide the 6 output channels"),
        ({"norm_groups": 2}, "norm_groups must be 1 for norm='rms'"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"norm_weight": torch.ones(5)}, r"norm_weight must have shape \(6,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(1, 4, 5), "weight": torch.zeros(6, 4, 3), "norm": "rms"}
    with pytest.raises(ValueError, match=message):
        ops.conv_nd_norm(**{**good, **change})
