"""`check_nonfinite`: a NaN or an infinity in an input reaches every output that depends on it, and no other."""

import warnings

import torch

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import _routes, inputs
from astrobiogen.testing.inputs import Arguments, Function

# A finite value far from the standard-normal draw: the outputs it changes are those that depend on the element.
PROBE = 3.7


def check_nonfinite(
    function: Function,
    reference: Function,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    ops: tuple[str, ...] = (),
    implementation: _routes.Implementation = "default",
) -> None:
    """Plant NaN, +Inf and -Inf, one at a time, in the middle of each floating-point tensor argument.

    With the reference as the measure: an output (or gradient) element that depends on the planted element, found by
    replacing it with another finite number in fp64, and is not finite in the reference, must not be finite in the
    op's result; an output that is finite in the reference must stay finite. (Depending on it matters: a masked-out
    NaN times zero is NaN in a plain reference, while a kernel that skips masked blocks rightly never sees it.) For
    gradients only the first half is demanded.

    Raises:
        AssertionError: a NaN or infinity is lost, or appears where the reference has none.
    """
    where = _routes.device_of(implementation, device)
    clean = inputs.build(case, dtype, where)
    floating = [n for n, v in clean.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()]
    for name in floating:
        depends = _depends(reference, case, clean, name)
        for planted in (float("nan"), float("inf"), float("-inf")):
            subject = f"{inputs.name_of(function)} [{implementation}], case {case.name!r}, {dtype}: {planted} in {name}"
            arguments = _plant(clean, name, planted)
            with warnings.catch_warnings():
                # NumPy, on which Triton's interpreter computes, warns about arithmetic with infinities.
                warnings.filterwarnings("ignore", category=RuntimeWarning)
                expected = _all(reference, case, arguments)
                with _routes.route(ops, implementation):
                    got = _all(function, case, arguments)
            for quantity, value in got.items():
                _judge(
                    f"{subject}: {quantity}",
                    value,
                    expected[quantity],
                    depends[quantity],
                    quantity.startswith("output"),
                )


def _judge(label: str, got: torch.Tensor, expected: torch.Tensor, depends: torch.Tensor, exact: bool) -> None:
    bad = ~torch.isfinite(got)
    lost = depends & ~torch.isfinite(expected) & ~bad
    if bool(lost.any()):
        where = tuple(int(i) for i in lost.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(lost.sum())} elements lost it; first at {where}: got {got[where].item():.6g}"
        )
    spread = bad & torch.isfinite(expected)
    if exact and bool(spread.any()):
        where = tuple(int(i) for i in spread.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(spread.sum())} elements caught it though the reference's are finite; first at {where}"
        )


def _depends(reference: Function, case: Case, clean: Arguments, name: str) -> dict[str, torch.Tensor]:
    wide = inputs.upcast(clean)
    before, after = _all(reference, case, wide), _all(reference, case, _plant(wide, name, PROBE))
    return {quantity: before[quantity] != after[quantity] for quantity in before}


def _all(function: Function, case: Case, arguments: Arguments) -> dict[str, torch.Tensor]:
    """Floating-point outputs and gradients by name; the upstream gradient is all ones."""
    plain = inputs.evaluate(function, arguments, (), []).outputs
    upstream = [torch.ones_like(o) if o.is_floating_point() else None for o in plain] if case.differentiable else []
    result = inputs.evaluate(function, arguments, case.differentiable, upstream)
    found = {f"output {i}": o for i, o in enumerate(result.outputs) if o.is_floating_point()}
    found |= {f"gradient of {name}": g for name, g in result.gradients.items() if g is not None}
    return found


def _plant(arguments: Arguments, name: str, value: float) -> Arguments:
    tensor = arguments[name].detach()
    planted = tensor.clone()
    position = tuple(size // 2 for size in planted.shape)
    planted[position] = value
    return {**arguments, name: planted}
