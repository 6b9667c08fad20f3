"""Convolution over one to five axes: the shared battery on the CPU and in Triton, its ties to PyTorch's own
convolutions, and bad input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import astrobiogen
from astrobiogen import layers, ops
from astrobiogen.kernels import registry
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.conv_nd.samples import CASES, LONG_CASES, TRANSPOSED_CASES
from astrobiogen.testing import check_battery, check_op
from tests.kernels.memory import peak_bytes

CONV_OPS = ("conv_nd", "conv_transpose_nd", "conv_nd_weight_grad", "conv_nd_bias_grad")
# One case per kernel family (packed and per-tap) also runs in half precision under the interpreter.
HALF_CASES = ("channel-last", "5d-channels")
INTERPRETED = [case for case in CASES if case.interpret]
INTERPRETED_TRANSPOSED = [case for case in TRANSPOSED_CASES if case.interpret]
NATIVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NATIVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def reference_conv(**arguments: Any) -> torch.Tensor:
    with astrobiogen.use_kernels("reference"):
        return ops.conv_nd(**arguments)


def reference_transpose(**arguments: Any) -> torch.Tensor:
    with astrobiogen.use_kernels("reference"):
        return ops.conv_transpose_nd(**arguments)


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_conv_nd_battery(case: Case) -> None:
    with registry.only_ops():
        check_battery(ops.conv_nd, reference_conv, case, ops=CONV_OPS, implementations=("cpu",))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # where PyTorch's convolution may serve the call
        check_op(ops.conv_nd, reference_conv, case, dtype, ops=CONV_OPS, implementation="default")


@pytest.mark.parametrize("case", TRANSPOSED_CASES, ids=lambda case: case.name)
def test_conv_transpose_nd_battery(case: Case) -> None:
    with registry.only_ops():
        check_battery(ops.conv_transpose_nd, reference_transpose, case, ops=CONV_OPS, implementations=("cpu",))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_op(ops.conv_transpose_nd, reference_transpose, case, dtype, ops=CONV_OPS, implementation="default")


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_conv_nd_in_triton(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if case.name in HALF_CASES else 1]:
        assert check_op(ops.conv_nd, reference_conv, case, dtype, ops=CONV_OPS, implementation="triton")


@pytest.mark.parametrize("case", INTERPRETED_TRANSPOSED, ids=lambda case: case.name)
def test_conv_transpose_nd_in_triton(case: Case) -> None:
    assert check_op(
        ops.conv_transpose_nd, reference_transpose, case, torch.float32, ops=CONV_OPS, implementation="triton"
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 2), (3, 2, 1)])
def test_equals_pytorch_up_to_three_axes(axes: int, stride: int, padding: int, dilation: int) -> None:
    size, kernel = (7, 6, 8)[:axes], (3, 2, 3)[:axes]
    arguments = [torch.randn(2, 4, *size), torch.randn(6, 2, *kernel), torch.randn(6)]
    leaves = [tensor.double().requires_grad_() for tensor in arguments]
    ours = ops.conv_nd(*leaves, stride=stride, padding=padding, dilation=dilation, groups=2)
    theirs = NATIVE[axes](*leaves, stride, padding, dilation, 2)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    for mine, other in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_equals_pytorch(axes: int) -> None:
    x, weight = torch.randn(2, 6, *(4, 5, 3)[:axes]).double(), torch.randn(6, 2, *(3, 2, 3)[:axes]).double()
    bias = torch.randn(4).double()
    ours = ops.conv_transpose_nd(x, weight, bias, stride=2, padding=1, output_padding=1, groups=2)
    torch.testing.assert_close(ours, NATIVE_TRANSPOSED[axes](x, weight, bias, 2, 1, 1, 2))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_equal_pytorch(mode: str) -> None:
    x, weight = torch.randn(2, 3, 4, 5, 6).double(), torch.randn(4, 3, 3, 3, 3).double()
    expected = F.conv3d(F.pad(x, (1, 1, 2, 2, 1, 1), mode=mode), weight)
    torch.testing.assert_close(ops.conv_nd(x, weight, padding=(1, 2, 1), padding_mode=mode), expected)


def test_five_axes_equal_a_sum_over_every_tap() -> None:
    x, weight = torch.randn(2, 2, 3, 2, 4, 3, 5).double(), torch.randn(3, 2, 2, 2, 3, 2, 3).double()
    padded = F.pad(x, (1, 1, 0, 0, 1, 1, 1, 1, 0, 0))
    out = [n - k + 1 for n, k in zip(padded.shape[2:], weight.shape[2:])]
    windows = padded
    for axis, taps in enumerate(weight.shape[2:]):
        windows = windows.unfold(2 + axis, taps, 1)
    expected = torch.einsum("bcuvwyzijklm,ocijklm->bouvwyz", windows, weight)
    assert list(expected.shape[2:]) == out
    torch.testing.assert_close(ops.conv_nd(x, weight, padding=(0, 1, 1, 0, 1)), expected)


def test_pole_rows_are_seen_from_the_other_side() -> None:
    x = torch.randn(1, 1, 4, 6)
    shift = torch.zeros(1, 1, 3, 1)
    shift[0, 0, 0, 0] = 1.0  # y[row] = x[row - 1]
    y = ops.conv_nd(x, shift, padding=(1, 0), padding_mode=("pole", "zeros"))
    torch.testing.assert_close(y[..., 0, :], x[..., 0, :].roll(3, -1), rtol=0, atol=0)
    torch.testing.assert_close(y[..., 1:, :], x[..., :-1, :], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("channels", "outputs"), [(2, 16), (64, 64), (8, 8)], ids=["own-kernel", "wide", "composition"]
)
def test_rolling_a_circular_axis_rolls_the_output_bitwise(channels: int, outputs: int) -> None:
    x, weight = torch.randn(1, channels, 3, 4, 3, 6, 16), torch.randn(outputs, channels, 3, 3, 3, 3, 3)
    modes = ("circular", "zeros", "zeros", "pole", "circular")
    y = ops.conv_nd(x, weight, padding=1, padding_mode=modes)
    for axis, steps in ((-5, 1), (-1, 5)):
        rolled = ops.conv_nd(x.roll(steps, axis), weight, padding=1, padding_mode=modes)
        assert torch.equal(rolled, y.roll(steps, axis)), f"axis {axis}"


# The second takes the composition: fewer than 8 outputs. A matrix product's remainder rows would differ in their bits.
@pytest.mark.parametrize(("channels", "outputs"), [(19, 10), (19, 6)])
def test_rolling_under_a_pointwise_inner_kernel(channels: int, outputs: int) -> None:
    x, weight = torch.randn(2, channels, 5, 2, 3, 6, 13), torch.randn(outputs, channels, 3, 1, 1, 1, 1)
    options: dict[str, Any] = {"padding": (1, 0, 0, 0, 0), "padding_mode": "circular"}
    y = ops.conv_nd(x, weight, **options)
    for axis, steps in ((-5, 2), (-1, 1), (-2, 1)):
        assert torch.equal(ops.conv_nd(x.roll(steps, axis), weight, **options), y.roll(steps, axis)), f"axis {axis}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 5, 3, 4, 20).to(dtype).requires_grad_()
    weight = torch.randn(24, 2, 3, 3, 3, 3).to(dtype).requires_grad_()

    def run() -> list[torch.Tensor]:
        y = ops.conv_nd(x, weight, padding=1, activation="silu")
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]

    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(2)
    together = run()
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[2], together[2])


# The points of 128 channels, 16 or with a paired last axis 64, pass the memory for partials: one unit of work, whose
# points are shared out.
@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("width", [9, 17])
def test_shared_points_do_not_change_a_bit(threads: int, width: int) -> None:
    x = torch.randn(1, 128, 2, 4, 5, width)
    weight = torch.randn(128, 128, 1, 3, 3, 3, requires_grad=True)

    def run() -> torch.Tensor:
        y = ops.conv_nd(x, weight, padding=(0, 1, 1, 1))
        return torch.autograd.grad(y.square().sum(), weight)[0]

    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    assert torch.equal(alone, run())


def test_output_has_channels_innermost_and_feeds_the_next_layer_without_a_copy() -> None:
    y = ops.conv_nd(torch.randn(2, 3, 4, 4, 4, 4), torch.randn(8, 3, 1, 1, 1, 1))
    assert y.movedim(1, -1).is_contiguous()


def calls_aten_convolution(channels: int, outputs: int, kernel: tuple[int, ...], dtype: torch.dtype) -> bool:
    x = torch.randn(1, channels, *(6,) * len(kernel)).to(dtype)
    weight = torch.randn(outputs, channels, *kernel).to(dtype)
    recording = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with recording as profiler, registry.only_ops():
        ops.conv_nd(x, weight, padding=tuple(taps // 2 for taps in kernel))
    return any(event.key == "aten::convolution" for event in profiler.key_averages())


def test_cpu_rule_is_what_kernel_status_says() -> None:
    """Both sides of every border in the rule's text: dtype, outputs, inputs without pairs, pairs."""
    rules = {row.op: row.reason for row in astrobiogen.kernel_status() if row.device == "cpu"}
    rule = rules["conv_nd"]
    assert rule == rules["conv_transpose_nd"]
    assert rule.endswith(rules["conv_nd_weight_grad"])
    assert rules["conv_nd_weight_grad"] == rules["conv_nd_norm"]
    assert all(part in rule for part in ("float32, bfloat16 and float16", ">= 8 outputs", "<= 4 inputs", "<= 3/4"))
    unpaired, paired = (1, 1, 2), (3, 3, 3)
    assert not calls_aten_convolution(4, 8, unpaired, torch.float32)
    assert calls_aten_convolution(5, 8, unpaired, torch.float32)
    assert calls_aten_convolution(4, 7, unpaired, torch.float32)
    assert not calls_aten_convolution(5, 8, (2, 1, 1, 1), torch.float32)
    assert calls_aten_convolution(5, 8, (2, 1, 1, 2), torch.float32)
    assert not calls_aten_convolution(5, 8, paired, torch.float32)
    assert not calls_aten_convolution(4, 8, unpaired, torch.bfloat16)
    assert not calls_aten_convolution(4, 8, unpaired, torch.float16)
    assert calls_aten_convolution(4, 8, unpaired, torch.float64)


def test_no_gradient_keeps_no_activation_input() -> None:
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(8, 2, 3, 3, requires_grad=True)
    with torch.no_grad():
        plain = ops.conv_nd(x, weight, activation="gelu")
    torch.testing.assert_close(plain, ops.conv_nd(x, weight, activation="gelu").detach(), rtol=0, atol=0)
    assert plain.grad_fn is None


def test_stem_adds_less_than_a_tenth_of_its_activations_in_memory() -> None:
    """2 -> 128 channels on months, epochs, levels and a 32 x 64 grid; a column matrix would be 3.8 times the output."""
    x = torch.randn(1, 12, 1, 10, 32, 64, 2).movedim(-1, 1)
    weight, bias = torch.randn(128, 2, 3, 3, 3, 3, 3, requires_grad=True), torch.randn(128, requires_grad=True)

    def run() -> torch.Tensor:
        return ops.conv_nd(x, weight, bias, padding=1, padding_mode=("zeros",) * 4 + ("circular",))

    y = run()
    upstream, activations = torch.randn_like(y), 4 * (x.numel() + y.numel())
    # Measured: 1.0035 outputs forward, 0.057 backward.
    assert peak_bytes(run) < 4 * y.numel() + 0.1 * activations
    assert peak_bytes(lambda: torch.autograd.grad(y, (weight, bias), upstream)) < 0.1 * activations


LAYERS = {
    "ConvNd": lambda: layers.ConvNd(2, 2, 9, 3, padding=1, activation="silu"),
    "Conv4d": lambda: layers.Conv4d(2, 9, (1, 1, 3, 3), padding=(0, 0, 1, 1)),
    "Conv5d": lambda: layers.Conv5d(5, 3, (3, 1, 1, 1, 1), padding=(1, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_under_autocast(build: Callable[[], layers.ConvNd], dtype: torch.dtype) -> None:
    """Values and gradients are those of the layer in half precision; parameters and their gradients stay fp32."""
    layer = build()
    x = torch.randn(2, layer.in_channels, *(4, 3, 3, 2, 2)[: layer.n_axes], requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, *layer.parameters()), upstream)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    half = build().to(dtype)
    half.load_state_dict(layer.state_dict())
    narrow = x.detach().to(dtype).requires_grad_()
    expected = half(narrow)
    assert torch.equal(y, expected)
    for mine, other in zip(gradients, torch.autograd.grad(expected, (narrow, *half.parameters()), upstream)):
        assert torch.equal(mine, other.float())


GOOD: dict[str, Any] = {
    "x": torch.zeros(1, 4, 5, 6),
    "weight": torch.zeros(6, 2, 3, 3),
    "bias": torch.zeros(6),
    "groups": 2,
}
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ({"x": torch.zeros(1, 4, 5, 6, dtype=torch.int64)}, TypeError, "x must be float32"),
    ({"weight": torch.zeros(6, 2, 3, 3).double()}, TypeError, "dtype of x"),
    ({"x": torch.zeros(1, 4)}, ValueError, "1 to 5 spatial axes"),
    ({"x": torch.zeros(1, 4, 1, 1, 1, 1, 1, 1)}, ValueError, "1 to 5 spatial axes"),
    ({"weight": torch.zeros(6, 2, 3)}, ValueError, "one kernel size for each of the 2 spatial axes"),
    ({"weight": torch.zeros(6, 3, 3, 3)}, ValueError, "C / groups = 4 / 2"),
    ({"weight": torch.zeros(5, 2, 3, 3), "bias": None}, ValueError, "multiple of groups = 2"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\)"),
    ({"groups": 0}, ValueError, "groups must be an integer >= 1"),
    ({"stride": (1, 0)}, ValueError, "stride on spatial axis 1 must be an integer >= 1, got 0"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be one integer or one per spatial axis"),
    ({"padding": (-1, 0)}, ValueError, "padding on spatial axis 0 must be an integer >= 0"),
    ({"dilation": 1.5}, TypeError, None),
    ({"dilation": (1, 2.0)}, TypeError, "dilation on spatial axis 1 must be an integer"),
    ({"dilation": (2, 3)}, ValueError, "kernel on spatial axis 1 reaches over 7 rows"),
    (
        {"padding": (0, 7), "padding_mode": "circular"},
        ValueError,
        "padding on spatial axis 1.*at most 6 in mode 'circular'",
    ),
    ({"padding": (5, 0), "padding_mode": ("reflect", "zeros")}, ValueError, "padding on spatial axis 0.*at most 4"),
    ({"padding_mode": ("zeros", "pole")}, ValueError, "'pole' on spatial axis 1 needs a following axis"),
    ({"padding_mode": "wrap"}, ValueError, "padding_mode on spatial axis 0 must be one of"),
    ({"activation": "relu"}, ValueError, "activation must be one of"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_input_names_the_argument_and_axis(
    change: dict[str, Any], kind: type[Exception], message: str | None
) -> None:
    with pytest.raises(kind, match=message):
        ops.conv_nd(**{**GOOD, **change})


def test_bad_transposed_input() -> None:
    x, weight = torch.zeros(1, 4, 5, 6), torch.zeros(4, 2, 3, 3)
    with pytest.raises(ValueError, match="output_padding on spatial axis 1 must be below the stride 1, got 1"):
        ops.conv_transpose_nd(x, weight, output_padding=(0, 1))
    with pytest.raises(ValueError, match="C = 4"):
        ops.conv_transpose_nd(x, weight[:3])
    with pytest.raises(ValueError, match="output on spatial axis 0 would have size"):
        ops.conv_transpose_nd(x, weight, padding=4)
