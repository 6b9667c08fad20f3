"""The battery's checks of what callers do to an operator: each finds the fault that is planted for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from astrobiogen import testing
from astrobiogen.kernels.cases import Case

Tensor = torch.Tensor
CASE = Case("3x4", lambda m: {"x": m.randn(3, 4), "weight": m.randn(4)}, ("x", "weight"), gradcheck=True)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The definition: x sin(x) weight."""
    return x * x.sin() * weight


def opaque(backward: Callable[[Any, Tensor], tuple[Tensor, Tensor]], save: Callable[..., tuple[Tensor, ...]]) -> Any:
    """`plain` behind an autograd function that saves `save(x, weight)`."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(*save(x, weight))
            return plain(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return backward(ctx, grad)

    return Kernel.apply


def slopes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the sum of `plain`."""
    return (x.sin() + x * x.cos()) * weight, (x * x.sin()).sum(0)


def test_plain_pytorch_passes_both() -> None:
    assert testing.check_transforms(plain, plain, CASE)
    testing.check_habits(plain, CASE)


def test_a_function_without_rules_for_transforms_is_found() -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x, _ = slopes(x, weight)
        return grad * of_x, (grad * x * x.sin()).sum(0)

    kernel = opaque(backward, lambda x, weight: (x, weight))
    testing.check_habits(kernel, CASE)
    with pytest.raises(AssertionError, match=r"grad of .*case '3x4'.*RuntimeError"):
        testing.check_transforms(kernel, plain, CASE)


def test_a_lost_tangent_is_found() -> None:
    """A value that hides its argument from forward mode alone, as an op of `register_autograd` did."""

    def deaf(x: Tensor, weight: Tensor) -> Tensor:
        forward = torch.autograd.forward_ad
        if forward._current_level >= 0 and not torch._C._are_functorch_transforms_active():
            x = forward.unpack_dual(x).primal
        return plain(x, weight)

    with pytest.raises(AssertionError, match=r"forward_mode of deaf"):
        testing.check_transforms(deaf, plain, CASE)


def test_gradients_handed_out_of_the_saved_tensors_are_found() -> None:
    kernel = opaque(lambda ctx, _: ctx.saved_tensors, slopes)

    def summed(x: Tensor, weight: Tensor) -> Tensor:
        return kernel(x, weight).sum()

    with pytest.raises(AssertionError, match=r"results_have_own_memory.*shares memory"):
        testing.check_habits(summed, CASE)


def test_a_second_run_of_a_graph_that_gives_less_is_found() -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        ctx.left = getattr(ctx, "left", 2.0) - 1.0
        return ctx.left * grad * slopes(x, weight)[0], ctx.left * (grad * x * x.sin()).sum(0)

    with pytest.raises(AssertionError, match=r"repeated_backward: run 1, gradient of x: differs"):
        testing.check_habits(opaque(backward, lambda x, weight: (x, weight)), CASE)


def test_a_packed_weight_that_outlives_a_write_is_found() -> None:
    packed = WeakTensorKeyDictionary()

    def caching(x: Tensor, weight: Tensor) -> Tensor:
        if weight not in packed:
            packed[weight] = weight.detach().clone()
        return plain(x, weight + (packed[weight] - weight).detach())

    with pytest.raises(AssertionError, match="data_writes"):
        testing.check_habits(caching, CASE)
