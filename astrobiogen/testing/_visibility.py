"""`check_visibility`: a NaN or an infinity in a row that a result may not see changes no bit of that result."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import _routes, inputs
from astrobiogen.testing.inputs import Arguments, Function

# What is planted in the first, a middle and the last row of each tensor.
PLANTED = (float("nan"), float("inf"), float("-inf"))
# Finite values that a row is replaced by, in multiples of one draw: a moderate one, and far ones to both sides, for
# what a function hears on one side only (ReLU).
PROBES = (3.7, 30.0, -30.0)
_UPSTREAM = "upstream gradient"


def check_visibility(
    function: Function,
    reference: Function,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    ops: tuple[str, ...] = (),
    implementation: _routes.Implementation = "default",
) -> None:
    """Plant NaN, +Inf or -Inf in one row at a time (along the last axis; one element of a vector) of each
    differentiable argument and upstream gradient, and demand that every element of an output or a gradient that cannot
    hear the row keeps its bits.

    What can hear a row is found by probing: an element that changes in the fp64 reference when the row is replaced by
    other finite numbers. An element may also be constant because a softmax has one member; unless the case says with
    `masks` that there is none such, what is not finite in the fp64 reference is taken to hear the row too.

    Raises:
        AssertionError: an element that cannot hear the row has other bits than without it.
    """
    where = _routes.device_of(implementation, device)
    clean = _copies(inputs.build(case, dtype, where))
    plain = inputs.evaluate(reference, clean, (), []).outputs
    upstream = inputs.draw_upstream(case, plain)
    problem = clean | {f"{_UPSTREAM} {index}": gradient for index, gradient in enumerate(upstream)}
    wide = inputs.upcast(problem)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # NumPy, on which Triton's interpreter computes, warns about arithmetic with infinities.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        quiet = _all(reference, case, wide)
        with _routes.route(ops, implementation):
            before = _all(function, case, problem)
        for name, row, value in _plants(case, problem):
            deaf = _deaf(reference, case, wide, quiet, name, row)
            if not case.masks:
                finite = _all(reference, case, _replaced(wide, name, row, value))
                deaf = {quantity: mask & torch.isfinite(finite[quantity]) for quantity, mask in deaf.items()}
            with _routes.route(ops, implementation):
                after = _all(function, case, _replaced(problem, name, row, value))
            label = f"{inputs.name_of(function)} [{implementation}], case {case.name!r}, {dtype}: {value} in {name}"
            for quantity, mask in deaf.items():
                _judge(f"{label}, row {row}: {quantity}", before[quantity], after[quantity], mask)


def _judge(label: str, before: torch.Tensor, after: torch.Tensor, deaf: torch.Tensor) -> None:
    heard = deaf & inputs.different_bits(before, after)
    if bool(heard.any()):
        where = tuple(int(i) for i in heard.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(heard.sum())} elements heard what they may not see; first at {where}: "
            f"{before[where].item():.7g} became {after[where].item():.7g}"
        )


def _plants(case: Case, problem: Arguments) -> Iterator[tuple[str, int, float]]:
    """(tensor, row, value): one plant per row that is tried."""
    for name, value in problem.items():
        if not (name in case.differentiable or name.startswith(_UPSTREAM)) or value is None or not value.numel():
            continue
        last = _rows(value).shape[0] - 1
        yield from zip([name] * len(PLANTED), sorted({0, last // 2, last}), PLANTED)


def _deaf(
    reference: Function, case: Case, wide: Arguments, quiet: dict[str, torch.Tensor], name: str, row: int
) -> dict[str, torch.Tensor]:
    draw = torch.randn(_rows(wide[name])[row].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(row))
    deaf = {quantity: torch.ones_like(value, dtype=torch.bool) for quantity, value in quiet.items()}
    for factor in PROBES:
        probed = _all(reference, case, _replaced(wide, name, row, (factor * draw).to(wide[name].device)))
        deaf = {quantity: mask & (probed[quantity] == quiet[quantity]) for quantity, mask in deaf.items()}
    return deaf


def _all(function: Function, case: Case, problem: Arguments) -> dict[str, torch.Tensor]:
    """Floating-point outputs and gradients by name, of arguments and upstream gradients together."""
    arguments = {name: value for name, value in problem.items() if not name.startswith(_UPSTREAM)}
    upstream = [value for name, value in problem.items() if name.startswith(_UPSTREAM)]  # one per output, in order
    result = inputs.evaluate(function, arguments, case.differentiable, upstream)
    found = {f"output {i}": o for i, o in enumerate(result.outputs) if o.is_floating_point()}
    return found | {f"gradient of {name}": g for name, g in result.gradients.items() if g is not None}


def _copies(arguments: Arguments) -> Arguments:
    """Every tensor in memory of its own, so that a planted copy is laid out as the clean one."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def _replaced(problem: Arguments, name: str, row: int, value: float | torch.Tensor) -> Arguments:
    tensor = problem[name]
    changed = _rows(tensor).clone()
    changed[row] = value
    planted = torch.empty_like(tensor)
    planted.copy_(changed.reshape(tensor.shape))
    return {**problem, name: planted}
