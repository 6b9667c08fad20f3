"""Numerical gradient check in fp64, the second derivative's contract, and gradients of one argument alone."""

import warnings
from collections.abc import Callable

import torch
from torch.autograd.gradcheck import GradcheckError

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import inputs
from astrobiogen.testing.inputs import Arguments, Function

REFUSAL = "has no second derivative"


def check_gradcheck(function: Function, case: Case, *, device: str | torch.device = "cpu") -> None:
    """`torch.autograd.gradcheck` in fp64: analytic against numerical derivatives (step 1e-6, absolute 1e-5, relative
    1e-3).

    Raises:
        AssertionError: they differ, or two backward runs do.
    """
    bound, leaves = _bind(function, case, device)
    try:
        torch.autograd.gradcheck(bound, leaves, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0)
    except GradcheckError as error:
        raise AssertionError(f"{inputs.name_of(function)}, case {case.name!r}, float64: gradcheck: {error}") from error


def check_second_derivative(function: Function, case: Case, *, device: str | torch.device = "cpu") -> None:
    """A second derivative is either right (`gradgradcheck` in fp64) or refused with an error that says so.

    Raises:
        AssertionError: the second derivative is wrong, or missing without that message.
    """
    subject = f"{inputs.name_of(function)}, case {case.name!r}, float64"
    bound, leaves = _bind(function, case, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autograd.gradgradcheck(bound, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)
    except GradcheckError as error:
        raise AssertionError(f"{subject}: gradgradcheck: {error}") from error
    except (RuntimeError, UserWarning) as error:
        if REFUSAL not in str(error):
            raise AssertionError(
                f"{subject}: the second derivative neither works nor says {REFUSAL!r}: {error}"
            ) from error


def check_partial_gradients(function: Function, case: Case, *, device: str | torch.device = "cpu") -> None:
    """The gradient of each argument alone equals, to the bit, the one computed together with the others (fp32).

    Raises:
        AssertionError: an argument's gradient is missing or has other bits when the other arguments need none.
    """
    subject = f"{inputs.name_of(function)}, case {case.name!r}, float32"
    arguments = inputs.build(case, torch.float32, device)
    outputs = inputs.evaluate(function, arguments, (), []).outputs
    upstream = inputs.draw_upstream(case, outputs)
    together = inputs.evaluate(function, arguments, case.differentiable, upstream).gradients
    for name in case.differentiable:
        alone = inputs.evaluate(function, arguments, (name,), upstream).gradients[name]
        expected = together[name]
        if (alone is None) != (expected is None):
            raise AssertionError(f"{subject}: gradient of {name} alone is {alone}, together with the others {expected}")
        if alone is not None and expected is not None and not inputs.same_bits(alone, expected):
            raise AssertionError(f"{subject}: gradient of {name} alone differs from the one computed with the others")


def _bind(
    function: Function, case: Case, device: str | torch.device
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    arguments: Arguments = inputs.build(case, torch.float64, device)
    leaves = tuple(_separate(arguments[name]).requires_grad_(True) for name in case.differentiable)

    def bound(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = inputs.as_tuple(function(**{**arguments, **dict(zip(case.differentiable, tensors))}))
        return tuple(output for output in outputs if output.is_floating_point())

    return bound, leaves


def _separate(tensor: torch.Tensor) -> torch.Tensor:
    """Strides kept unless elements share memory (expanded): gradcheck perturbs them one by one."""
    shared = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().clone(memory_format=torch.contiguous_format if shared else torch.preserve_format)
