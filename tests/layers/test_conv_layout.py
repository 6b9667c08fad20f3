"""Shapes, paddings and memory layouts of convolutions: those of PyTorch's modules, over any number of axes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import astrobiogen
from astrobiogen import ops
from astrobiogen.layers import ConvNd, ConvNormAct

TORCH = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (6, 4, 5, 4, 3)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_padding_words_are_those_of_torch(axes: int, mode: Any) -> None:
    x = torch.randn(2, 3, *SIZES[:axes])
    for kernel, dilation, padding in itertools.product((1, 2, 3, 4), (1, 2), ("same", "valid")):
        if mode == "reflect" and padding == "same" and dilation * (kernel - 1) > 5:
            continue  # more rows than there are to mirror
        if dilation * (kernel - 1) >= min(SIZES[:axes]) and (padding == "valid" or mode != "zeros"):
            continue
        theirs = TORCH[axes](3, 8, kernel, padding=padding, dilation=dilation, padding_mode=mode)
        ours = ConvNd(axes, 3, 8, kernel, padding=padding, dilation=dilation, padding_mode=mode)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
def test_an_even_kernel_keeps_the_size(axes: int) -> None:
    """One row more at the end of every axis, in every mode: as the same rows written out."""
    x = torch.randn(1, 2, *SIZES[:axes], requires_grad=True)
    for mode in ("zeros", "circular"):
        layer = ConvNd(axes, 2, 3, 2, padding="same", padding_mode=mode)
        wide = x
        for axis in range(2, 2 + axes):
            end = wide.narrow(axis, 0, 1)
            wide = torch.cat([wide, end if mode == "circular" else torch.zeros_like(end)], dim=axis)
        expected = ops.conv_nd(wide, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])


def test_an_even_kernel_over_a_pole() -> None:
    """Latitude continues on the opposite meridian: one row above, two below, then the circle of longitudes."""
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 4, 2)
    rows = torch.cat([x[:, :, :1].roll(3, 3), x, x[:, :, -2:].flip(2).roll(3, 3)], dim=2)
    expected = ops.conv_nd(torch.cat([rows, rows[..., :1]], dim=3), weight)
    got = ops.conv_nd(x, weight, padding="same", padding_mode=("pole", "circular"))
    torch.testing.assert_close(got, expected)


def test_padding_words_that_do_not_fit() -> None:
    x, weight = torch.randn(1, 2, 5), torch.randn(3, 2, 2)
    with pytest.raises(ValueError, match="stride must be 1"):
        ops.conv_nd(x, weight, stride=2, padding="same")
    with pytest.raises(ValueError, match="needs stride 1"):
        ConvNd(1, 2, 3, 2, stride=2, padding="same")
    for make in (lambda: ops.conv_nd(x, weight, padding="full"), lambda: ConvNd(1, 2, 3, 2, padding="full")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'full'"):
            make()
    with pytest.raises(ValueError, match="memory_format"):
        ops.conv_nd(x, weight, memory_format="contiguous")  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
def test_without_a_batch(axes: int) -> None:
    x = torch.randn(4, *SIZES[:axes], requires_grad=True)
    layers = (
        ConvNd(axes, 4, 8, 3, padding=1, groups=2, activation="silu"),
        ConvNd(axes, 4, 8, 2, padding="same"),
        ConvNormAct(axes, 4, 8, 3, padding=1),
        ConvNormAct(axes, 4, 8, 3, "group", 2, padding=1),
    )
    for kernels, layer in itertools.product(("auto", "reference"), layers):
        with astrobiogen.use_kernels(kernels):  # type: ignore[arg-type]
            out = layer(x)
            torch.testing.assert_close(out, layer(x[None])[0])
            assert out.is_contiguous()
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.shape == x.shape
    weight = torch.randn(4, 3, *[2] * axes)
    torch.testing.assert_close(ops.conv_transpose_nd(x, weight), ops.conv_transpose_nd(x[None], weight)[0])
    with pytest.raises(ValueError, match=r"x must be \[B, C, \*spatial\]|weight must have"):
        ops.conv_nd(x[0], torch.randn(2, 4, *[1] * axes))


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["own kernel", "composition", "norm", "children"])
def test_the_layout_that_came_in_goes_out(axes: int, kind: str) -> None:
    inputs = {"own kernel": 3, "composition": 16, "norm": 3, "children": 3}[kind]
    if kind in ("norm", "children"):
        layer: Any = ConvNormAct(axes, inputs, 8, 3, padding=1)
        wide = ConvNormAct(axes, inputs, 8, 3, padding=1, memory_format="channels_last")
    else:
        layer, wide = (ConvNd(axes, inputs, 8, 3, padding=1, memory_format=m) for m in ("preserve", "channels_last"))
    wide.load_state_dict(layer.state_dict())
    if kind == "children":
        for one in (layer, wide):
            one.conv.register_forward_hook(lambda *_: None)
    x = torch.randn(2, inputs, *SIZES[:axes])
    plain, last, asked = layer(x), layer(channels_last(x)), wide(x)
    assert plain.view(2, -1).shape[1] == plain[0].numel()
    assert plain.is_contiguous()
    for y in (last, asked):
        assert y.movedim(1, -1).is_contiguous()
        torch.testing.assert_close(y, plain)
    assert layer(x.expand(2, *x.shape[1:])[:, :, ::2]).is_contiguous()


@pytest.mark.parametrize("axes", [2, 3])
def test_the_layout_is_the_one_of_torch(axes: int) -> None:
    """Also where the weight was made channels-last, as `module.to(memory_format=...)` does."""
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    for input_last, weight_last in itertools.product((False, True), repeat=2):
        theirs, ours = TORCH[axes](3, 8, 3), ConvNd(axes, 3, 8, 3)
        x = torch.randn(2, 3, *SIZES[:axes])
        if weight_last:
            theirs, ours = (module.to(memory_format=last) for module in (theirs, ours))
        x = x.to(memory_format=last) if input_last else x
        assert ours(x).stride() == theirs(x).stride(), (input_last, weight_last)


def test_a_chain_of_channels_last_layers_copies_nothing_back() -> None:
    """What the models rely on: with `memory_format="channels_last"` results come as the kernels write them."""
    first, second = (ConvNd(2, 8, 8, 3, padding=1, memory_format="channels_last") for _ in range(2))
    x = torch.randn(1, 8, 5, 4)
    raw = torch.ops.astrobiogen.conv_nd(x, first.weight, first.bias, [1, 1], [1, 1], [0, 0], [1, 1], 1, 0, False)[0]
    assert first(x).stride() == raw.stride() == second(first(x)).stride()
    torch.testing.assert_close(F.conv2d(x, first.weight, first.bias, padding=1), first(x))
