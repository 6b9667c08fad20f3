"""The battery itself: a healthy toy op passes, and each planted fault is found by the check that is meant to find it.

The toy is y = x * weight + mean(x, last axis), with x [..., C] and weight [C]; each fault replaces its forward or
its gradient.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from astrobiogen import testing
from astrobiogen.kernels.cases import Case

Tensor = torch.Tensor
Toy = Callable[[Tensor, Tensor], Tensor]
Gradients = tuple[Tensor | None, Tensor | None]
Backward = Callable[[Tensor, Tensor, Tensor], Gradients]

PLAIN = Case("3x5", lambda m: {"x": m.randn(3, 5), "weight": m.randn(5)}, ("x", "weight"), gradcheck=True)
WIDE = Case("2x4096", lambda m: {"x": m.randn(2, 4096), "weight": m.randn(4096)}, ("x", "weight"))
STRIDED = Case("strided", lambda m: {"x": m.randn(4, 10)[:, ::2], "weight": m.randn(5)}, ("x", "weight"))
EXPANDED = Case(
    "expanded", lambda m: {"x": m.randn(1, 5).expand(4, 5), "weight": m.randn(5)}, ("x", "weight"), gradcheck=True
)
EMPTY = Case("no rows", lambda m: {"x": m.randn(0, 5), "weight": m.randn(5)}, ("x", "weight"))
SINGLE = Case("1x1", lambda m: {"x": m.randn(1, 1), "weight": m.randn(1)}, ("x", "weight"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, with fp32 accumulation."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * weight.to(wide.dtype) + wide.mean(-1, keepdim=True)).to(x.dtype)


def good_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    """Gradients of the toy."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide = grad.to(accumulate)
    grad_x = wide * weight.to(accumulate) + wide.mean(-1, keepdim=True)
    grad_weight = (wide * x.to(accumulate)).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def toy(forward: Toy = reference, backward: Backward = good_backward, *, once: bool = True) -> Toy:
    """An autograd function of the given forward and backward, opaque to autograd like a kernel."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return forward(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Gradients:
            if not once:
                return backward(grad, *ctx.saved_tensors)
            with torch.no_grad():
                return backward(grad, *ctx.saved_tensors)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return Kernel.apply(x, weight)

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [PLAIN, WIDE, STRIDED, EXPANDED, EMPTY, SINGLE], ids=lambda case: case.name)
def test_a_healthy_op_passes(case: Case, dtype: torch.dtype) -> None:
    measurements = testing.check_op(toy(), reference, case, dtype)
    assert [row.quantity for row in measurements] == ["output 0", "gradient of x", "gradient of weight"]
    assert all(row.error <= row.allowed and row.dtype == dtype for row in measurements)


def test_a_healthy_op_passes_the_derivative_and_nonfinite_checks() -> None:
    for case in (PLAIN, EXPANDED):
        testing.check_gradcheck(toy(), case)
        testing.check_nonfinite(toy(), reference, case)
        testing.check_partial_gradients(toy(), case)
        testing.check_second_derivative(reference, case)


def _skips_last_column(x: Tensor, weight: Tensor) -> Tensor:
    y = reference(x, weight)
    y[..., -1] = 0
    return y


def _reads_neighbour(x: Tensor, weight: Tensor) -> Tensor:
    strides = x.stride()
    window = x.as_strided((*x.shape[:-1], x.shape[-1] + 1), strides)  # one column too many, multiplied by zero
    return reference(x, weight) + (window.sum(-1, keepdim=True) * 0)


def _writes_neighbour(x: Tensor, weight: Tensor) -> Tensor:
    y = reference(x, weight)
    x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(1.0)
    return y


def _mutates_input(x: Tensor, weight: Tensor) -> Tensor:
    y = reference(x, weight)
    x.detach()[0, 0] += 1
    return y


def _leaves_output_uninitialised(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :-1] = reference(x, weight)[..., :-1]
    if bool(torch.isfinite(y[..., -1]).all()):
        y[..., -1] = reference(x, weight)[..., -1]  # lucky memory: only poison shows the fault
    return y


def _assumes_contiguous(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x.as_strided(x.shape, (x.shape[-1], 1)), weight)


def _narrow_accumulator(x: Tensor, weight: Tensor) -> Tensor:
    mean = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for column in range(0, x.shape[-1], 4):
        mean = mean + x[..., column : column + 4].square().sum(-1)
    return ((x.float() * weight.float()) + (mean / x.shape[-1]).unsqueeze(-1).float()).to(x.dtype)


def _reference_of_squares(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * weight.to(wide.dtype) + wide.square().mean(-1, keepdim=True)).to(x.dtype)


def _wrong_dtype(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight).double()


def _wrong_shape(x: Tensor, weight: Tensor) -> Tensor:
    return reference(x, weight)[:, None]


@pytest.mark.parametrize(
    ("forward", "case", "message"),
    [
        (_skips_last_column, PLAIN, "output 0: largest error"),
        (_skips_last_column, WIDE, "output 0: largest error"),
        (_reads_neighbour, PLAIN, "not finite"),
        (_reads_neighbour, STRIDED, "not finite"),
        (_writes_neighbour, PLAIN, "x was written to"),
        (_mutates_input, PLAIN, "x was written to"),
        (_leaves_output_uninitialised, PLAIN, "not finite"),
        (_assumes_contiguous, STRIDED, "not finite"),
        (_wrong_dtype, PLAIN, "the reference gives"),
        (_wrong_shape, PLAIN, "the reference gives"),
    ],
)
def test_forward_faults_are_found(forward: Toy, case: Case, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_op(toy(forward), reference, case, torch.float32)


def test_a_narrow_accumulator_is_found() -> None:
    with pytest.raises(AssertionError, match=r"error .* exceeds the allowed"):
        testing.check_op(_narrow_accumulator, _reference_of_squares, WIDE, torch.bfloat16)


def _drops_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    return good_backward(grad, x, weight)[0], None


def _zero_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    return good_backward(grad, x, weight)[0], torch.zeros_like(weight)


def _misses_last_row(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    return good_backward(grad, x, weight)[0], good_backward(grad[:-1], x[:-1], weight)[1]


def _overwrites_upstream(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    found = good_backward(grad, x, weight)
    grad.detach()[0, 0] = 0
    return found


def _assumes_contiguous_upstream(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
    return good_backward(grad.as_strided(grad.shape, (grad.shape[-1], 1)), x, weight)


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (_drops_weight_gradient, "gradient of weight is missing"),
        (_zero_weight_gradient, "gradient of weight: largest error"),
        (_misses_last_row, "gradient of weight: largest error"),
        (_overwrites_upstream, "upstream gradient 0 was written to"),
        (_assumes_contiguous_upstream, "gradient of x, unaligned"),
    ],
)
def test_backward_faults_are_found(backward: Backward, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_op(toy(backward=backward), reference, PLAIN, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 2e-4, 1e-9])
def test_a_gradient_that_is_a_thousandth_wrong_is_found_whatever_its_size(scale: float) -> None:
    """Half of the tensors here hold values of `scale`, as gradients of a mean over many tokens do."""
    case = Case("small", lambda m: {"x": m.randn(3, 5) * scale, "weight": m.randn(5) * scale}, ("x", "weight"))

    def wrong(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        grad_x, grad_weight = good_backward(grad, x, weight)
        assert grad_weight is not None
        return grad_x, grad_weight * 1.001

    with pytest.raises(AssertionError, match="gradient of weight: largest error"):
        testing.check_op(toy(backward=wrong), reference, case, torch.float32)
    testing.check_op(toy(), reference, case, torch.float32)


def test_eager_that_was_lucky_on_one_element_is_measured_again() -> None:
    """A result of one element that cancels: what rounds is its summands, of order one."""
    case = Case("sum", lambda m: {"x": torch.cat((x := m.randn(63), -x, m.randn(1) * 1e-6))}, ())

    def eager(x: Tensor) -> Tensor:
        rounds = bool((x.double().sum().abs() * 1e9).long() % 2) or x.dtype == torch.float64
        return x.sum() if rounds else x.double().sum().to(x.dtype)  # exact in one case of two

    def other_order(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for value in x:
            total = total + value
        return total

    def wrong(x: Tensor) -> Tensor:
        return other_order(x) + 1e-4

    for seed in range(4):
        testing.check_op(other_order, eager, case, torch.float32, seed=seed)
        with pytest.raises(AssertionError, match="largest error"):
            testing.check_op(wrong, eager, case, torch.float32, seed=seed)


def test_a_result_that_changes_between_runs_is_found() -> None:
    runs: list[int] = []

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        runs.append(0)
        y = reference(x, weight)
        return (
            y * (1 + torch.finfo(x.dtype).eps) if len(runs) % 2 else y
        )  # one unit in the last place: within every tolerance

    with pytest.raises(AssertionError, match="output 0 differs between two runs"):
        testing.check_op(toy(forward), reference, PLAIN, torch.float32)


def test_a_gradient_that_changes_between_runs_is_found() -> None:
    runs: list[int] = []

    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        runs.append(0)
        grad_x, grad_weight = good_backward(grad, x, weight)
        assert grad_weight is not None
        return grad_x, grad_weight * (1 + torch.finfo(x.dtype).eps * (len(runs) % 2))

    with pytest.raises(AssertionError, match="gradient of weight differs between two runs"):
        testing.check_op(toy(backward=backward), reference, PLAIN, torch.float32)


def test_lost_and_spread_nonfinite_values_are_found() -> None:
    def loses_nan(x: Tensor, weight: Tensor) -> Tensor:
        return reference(x, weight).nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))

    def clips_infinity(x: Tensor, weight: Tensor) -> Tensor:
        return reference(x, weight).clamp(-1e30, 1e30)

    def spreads(x: Tensor, weight: Tensor) -> Tensor:
        return reference(x, weight) + 0 * x.sum()

    def gradient_loses_nan(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        grad_x, grad_weight = good_backward(grad, x, weight)
        assert grad_weight is not None
        return grad_x, grad_weight.nan_to_num()

    for fault, message in (
        (toy(loses_nan), "nan in x: output 0: .* lost it"),
        (toy(clips_infinity), "inf in x: output 0: .* lost it"),
        (toy(spreads), "caught it"),
        (toy(backward=gradient_loses_nan), "gradient of weight: .* lost it"),
    ):
        with pytest.raises(AssertionError, match=message):
            testing.check_nonfinite(fault, reference, PLAIN)


def test_a_hidden_row_that_is_heard_is_found() -> None:
    """The toy is a running sum over rows: row i may hear rows 0 .. i."""
    case = Case("4x3", lambda m: {"x": m.randn(4, 3)}, ("x",), masks=True)

    def running_sum(x: Tensor) -> Tensor:
        return x.cumsum(0)

    def weighs_with_zero(x: Tensor) -> Tensor:
        return torch.ones(4, 4, dtype=x.dtype).tril() @ x

    class GradientWeighsWithZero(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            del ctx
            return x.cumsum(0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            del ctx
            return torch.ones(4, 4, dtype=grad.dtype).triu() @ grad

    testing.check_visibility(running_sum, running_sum, case)
    for fault, measure, message in (
        (weighs_with_zero, running_sum, "inf in x, row 1: output 0: 3 elements heard what they may not see"),
        (GradientWeighsWithZero.apply, running_sum, "upstream gradient 0, row 0: gradient of x: 9 elements heard"),
        (weighs_with_zero, weighs_with_zero, "output 0: 3 elements heard what they may not see"),
    ):
        with pytest.raises(AssertionError, match=message):
            testing.check_visibility(fault, measure, case)


def test_wrong_derivatives_are_found() -> None:
    def wrong(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        grad_x, grad_weight = good_backward(grad, x, weight)
        assert grad_x is not None
        return grad_x * 1.01, grad_weight

    with pytest.raises(AssertionError, match="gradcheck"):
        testing.check_gradcheck(toy(backward=wrong), PLAIN)
    with pytest.raises(AssertionError, match="gradgradcheck"):
        testing.check_second_derivative(toy(), PLAIN)  # silently zero

    def refuses(grad: Tensor, x: Tensor, weight: Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError("not supported")  # without the sentence that tells a user what to do
        return good_backward(grad, x, weight)

    with pytest.raises(AssertionError, match="neither works nor says"):
        testing.check_second_derivative(toy(backward=refuses, once=False), PLAIN)


def test_a_gradient_that_depends_on_who_asks_is_found() -> None:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return reference(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Gradients:
            grad_x, grad_weight = good_backward(grad, *ctx.saved_tensors)
            return grad_x, grad_weight if ctx.needs_input_grad[0] else None

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return Kernel.apply(x, weight)

    with pytest.raises(AssertionError, match="gradient of weight alone"):
        testing.check_partial_gradients(function, PLAIN)
