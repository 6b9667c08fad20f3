"""Convolution with norm and activation: the three norms against fp64, on the CPU, and the layer."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import astrobiogen
from astrobiogen import layers, ops
from astrobiogen.kernels._case import Case, TensorMaker
from astrobiogen.testing import check_op

OPS = ("conv_nd_norm", "conv_nd_norm_backward", "conv_nd", "conv_transpose_nd", "conv_nd_weight_grad")
ARGUMENTS = ("x", "weight", "bias", "norm_weight", "norm_bias")
NORMS = {"rms": 1, "layer": 1, "group": 3}


def reference(**arguments: Any) -> torch.Tensor:
    with astrobiogen.use_kernels("reference"):
        return ops.conv_nd_norm(**arguments)


def case(
    norm: str, channels: int, outputs: int, spatial: tuple[int, ...], batch: int = 2, activation: str = "silu"
) -> Case:
    def build(make: TensorMaker) -> dict[str, Any]:
        return {
            "x": make.randn(batch, channels, *spatial),
            "weight": make.randn(outputs, channels, *[3] * len(spatial)),
            "bias": make.randn(outputs),
            "norm_weight": make.randn(outputs),
            "norm_bias": make.randn(outputs),
            "norm": norm,
            "norm_groups": NORMS[norm],
            "padding": 1,
            "activation": activation,
        }

    return Case(f"{norm}-{channels}-{outputs}", build, ARGUMENTS)


# Own kernel (few inputs, pairs of outputs, one row), composition (fewer than 8 outputs), empty batch.
SHAPES = [(2, 12, (3, 4, 5), 2), (5, 33, (4, 5), 2), (3, 9, (7,), 1), (3, 6, (2, 2, 3, 4), 2), (2, 12, (3, 4), 0)]


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize(("channels", "outputs", "spatial", "batch"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(
    norm: str, channels: int, outputs: int, spatial: tuple[int, ...], batch: int, dtype: torch.dtype
) -> None:
    check_op(ops.conv_nd_norm, reference, case(norm, channels, outputs, spatial, batch), dtype, ops=OPS)


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gradients_in_fp64(norm: str, activation: str) -> None:
    check_op(ops.conv_nd_norm, reference, case(norm, 2, 9, (2, 3), 2, activation), torch.float64, ops=OPS)


@pytest.mark.parametrize("norm", list(NORMS))
def test_equals_pytorchs_modules(norm: str) -> None:
    layer = layers.ConvNormAct(3, 4, 12, 3, norm=norm, norm_groups=NORMS[norm], padding=1).double()
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
        u = F.group_norm(z, NORMS[norm], weight, layer.norm.bias, 1e-5)
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
