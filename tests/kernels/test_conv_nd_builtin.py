"""Convolutions that are one call of PyTorch's: which calls, that they are that call, and what of ours they keep."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from astrobiogen import layers, ops
from astrobiogen.kernels import registry
from astrobiogen.kernels.conv_nd import builtin

PLAIN: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
HALF = pytest.mark.skipif(
    not builtin.half_precision(torch.bfloat16), reason="this CPU has no bf16 instructions that oneDNN would use"
)
SIZES = (6, 7, 5)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def reaches_an_op(call: Callable[[], torch.Tensor]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return any(event.key.startswith("astrobiogen::") for event in profiler.key_averages())


def served(
    shape: tuple[int, ...], weight: tuple[int, ...], training: bool, innermost: bool, dtype: torch.dtype, **options: Any
) -> bool:
    """Whether PyTorch's convolution serves the call."""
    x = torch.randn(shape).to(dtype)
    x = (last(x) if innermost else x).requires_grad_(training)
    call = lambda: ops.conv_nd(x, torch.zeros(weight, dtype=dtype), memory_format="preserve", **options)  # noqa: E731
    return not reaches_an_op(call)


SAME: dict[str, Any] = {"padding": 1}
# Calls on both sides of every border of the rule: x, weight, options, dtype, and the cases that an own kernel serves.
BORDERS = [
    ((1, 16, 6, 6, 6), (16, 16, 3, 3, 3), SAME, torch.float32, builtin.ALWAYS),
    ((1, 3, 6, 6, 6), (16, 3, 3, 3, 3), SAME, torch.float32, builtin.ALWAYS - builtin.TRAINING),
    ((1, 16, 6, 6, 6), (7, 16, 3, 3, 3), SAME, torch.float32, 0),
    ((2, 16, 6, 6, 6), (16, 16, 3, 3, 3), SAME, torch.float32, 0),
    ((2, 32, 8, 16, 16), (32, 32, 3, 3, 3), SAME, torch.float32, builtin.ALWAYS),
    ((1, 16, 6, 6, 6), (16, 16, 3, 3, 3), SAME | {"stride": 2}, torch.float32, 0),
    ((1, 16, 6, 6, 6), (16, 16, 3, 3, 3), {"padding": 2, "dilation": 2}, torch.float32, 0),
    ((1, 16, 6, 6, 6), (16, 16, 1, 1, 1), {}, torch.float32, builtin.TRAINING_LAST),
    ((1, 64, 56, 56), (64, 64, 3, 3), SAME, torch.float32, builtin.FORWARD_LAST | builtin.TRAINING_LAST),
    ((1, 64, 55, 56), (64, 64, 3, 3), SAME, torch.float32, 0),
    ((1, 63, 56, 56), (64, 63, 3, 3), SAME, torch.float32, 0),
    ((1, 3, 64, 64), (8, 3, 4, 4), {"stride": 4}, torch.float32, builtin.TRAINING | builtin.TRAINING_LAST),
    ((1, 3, 64, 64), (8, 3, 2, 2), {"stride": 2}, torch.float32, 0),
    ((1, 8, 9, 9), (8, 1, 7, 7), {"padding": 3, "groups": 8}, torch.float32, builtin.TRAINING),
    ((1, 8, 9, 9), (8, 1, 3, 3), {"padding": 1, "groups": 8}, torch.float32, 0),
    ((1, 16, 64), (16, 16, 3), SAME, torch.float32, 0),
    ((1, 1, 4096), (16, 1, 9), {"padding": 4}, torch.float32, builtin.FORWARD_LAST | builtin.TRAINING_LAST),
    ((1, 16, 6, 6, 6), (16, 16, 3, 3, 3), SAME, torch.float64, 0),
    pytest.param((1, 16, 6, 6, 6), (16, 16, 3, 3, 3), SAME, torch.bfloat16, 0, marks=HALF),
    pytest.param(
        (1, 8, 9, 9), (8, 1, 7, 7), {"padding": 3, "groups": 8}, torch.bfloat16,
        builtin.TRAINING | builtin.TRAINING_LAST, marks=HALF,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "weight", "options", "dtype", "own"), BORDERS)
def test_the_rule(
    shape: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, own: int
) -> None:
    cases = {(False, False): 1, (True, False): 2, (False, True): 4, (True, True): 8}
    for (training, innermost), bit in cases.items():
        ambiguous = shape[1] == 1 and innermost  # one channel: the same memory
        if not ambiguous:
            assert served(shape, weight, training, innermost, dtype, **options) == (not own & bit), (
                training,
                innermost,
            )


def test_several_threads_reach_onednn() -> None:
    x, weight = torch.randn(1, 16, 6, 6, 6), torch.randn(16, 16, 3, 3, 3)
    assert reaches_an_op(lambda: ops.conv_nd(x, weight, padding=1))
    torch.set_num_threads(2)
    assert not reaches_an_op(lambda: ops.conv_nd(x, weight, padding=1))


def test_what_stays_an_op() -> None:
    """Other paddings, taps that never meet data, more axes, and what a test or a reference asks for."""
    image, weight = torch.randn(1, 4, 6, 6), torch.randn(8, 4, 3, 3)
    assert not reaches_an_op(lambda: ops.conv_nd(image, weight, padding=1))
    assert reaches_an_op(lambda: ops.conv_nd(image, weight, padding=1, padding_mode="circular"))
    assert reaches_an_op(lambda: ops.conv_nd(image[..., :1], weight, padding=1))
    assert reaches_an_op(lambda: ops.conv_nd(image[..., None, None], weight[..., None, None], padding=(1, 1, 0, 0)))
    with registry.only_ops():
        assert reaches_an_op(lambda: ops.conv_nd(image, weight, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALF)])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_pytorchs_call(axes: int, transposed: bool, dtype: torch.dtype) -> None:
    """Bit for bit, values and every gradient, in the same layout."""
    x = torch.randn(2, 6, *SIZES[:axes]).to(dtype).requires_grad_()
    weight = torch.randn(6 if transposed else 9, 9 if transposed else 6, *[3] * axes).to(dtype).requires_grad_()
    leaves = (x, weight, torch.randn(9).to(dtype).requires_grad_())
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    if transposed:
        options["output_padding"] = 1
    ours = (ops.conv_transpose_nd if transposed else ops.conv_nd)(*leaves, memory_format="preserve", **options)
    theirs = (TRANSPOSED if transposed else PLAIN)[axes](*leaves, **options)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()
    upstream = torch.randn_like(theirs)
    for mine, other in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALF)])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout(axes: int, transposed: bool, dtype: torch.dtype) -> None:
    """One and more channels in and out, any layout of x and weight: the layout that was asked for, the op's values."""
    function = ops.conv_transpose_nd if transposed else ops.conv_nd
    for inputs, outputs, stride in itertools.product((1, 4), (1, 8), (1, 2)):
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        x, weight = torch.randn(2, inputs, *SIZES[:axes]).to(dtype), torch.randn(*shape, *[3] * axes).to(dtype)
        with registry.only_ops():
            expected = function(x, weight, stride=stride, padding=1)
        for first, second in itertools.product((torch.clone, last), repeat=2):
            asked = function(first(x), second(weight), stride=stride, padding=1)
            kept = function(first(x), second(weight), stride=stride, padding=1, memory_format="preserve")
            assert asked.movedim(1, -1).is_contiguous()
            innermost = any(not t.is_contiguous() for t in (first(x), second(weight)))
            assert kept.movedim(1, -1).is_contiguous() if innermost else kept.is_contiguous()
            for got in (asked, kept):
                torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations(activation: Any) -> None:
    x, weight = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(9, 6, 3, 3)
    y = ops.conv_nd(x, weight, activation=activation, memory_format="preserve")
    assert torch.equal(y, getattr(F, activation)(F.conv2d(x, weight)))
    assert y.grad_fn is not None


def test_numbers_in_every_form() -> None:
    x, weight = torch.randn(2, 6, 8, 7), torch.randn(9, 6, 3, 3)
    expected = F.conv2d(x, weight, padding=1)
    for padding in (1, (1, 1), [1, 1], "same"):
        found = ops.conv_nd(x, weight, padding=padding, padding_mode=("zeros", "zeros"))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ops.conv_nd(x, weight, padding="valid"), F.conv2d(x, weight))
    torch.testing.assert_close(ops.conv_nd(x[0], weight, padding=1), expected[0])
    for stride in (True, 1.0, (1.0, 1.0), (True, True)):  # equal to a number that was served before
        with pytest.raises(TypeError, match="stride"):
            ops.conv_nd(x, weight, padding=1, stride=stride)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output_padding"):
        ops.conv_transpose_nd(x, torch.randn(6, 2, 3, 3), stride=2, output_padding=2)


@HALF
def test_autocast_reaches_pytorch_too() -> None:
    layer, x = layers.ConvNd(2, 6, 9, 3), torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not reaches_an_op(lambda: layer(x))
        y = layer(x)
    assert layer.bias is not None
    assert torch.equal(y, F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


def test_a_second_derivative() -> None:
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((1, 2, 5, 4), (3, 2, 3, 3), (3,))]
    assert torch.autograd.gradgradcheck(lambda *tensors: ops.conv_nd(*tensors, padding=1), leaves)
