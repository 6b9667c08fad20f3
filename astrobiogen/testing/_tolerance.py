"""The error rule: an op may be at most twice (gradients: three times) as far from the fp64 result as the eager
reference is.

Errors are measured twice, as the largest and as the root-mean-square difference: the first finds a single wrong
element, the second an accumulator that is too narrow. A floor keeps the rule meaningful where eager happens to be
exact:

    floor = 1/2 eps(result dtype) * size  +  4 eps(fp32) * size  +  16 eps(fp32)

with `size` the largest (root-mean-square) magnitude of the fp64 result: one rounding of the result (half a unit in
the last place; 1/4 for the root mean square, since rounding errors are spread evenly), a few roundings of the
accumulator, and the rounding of the order-one intermediates of standard-normal inputs where the result itself
cancels to nearly zero. For fp64 results eps(fp64) takes the place of eps(fp32).

Triton's interpreter cuts fp32 off to bf16 where a GPU rounds to the nearest (Triton 3.7.1), with every stored value:
there the first term is 2 eps(bf16) * size for both measures. On a GPU the rule is the strict one.
"""

import dataclasses

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One comparison: which quantity of which op and case, its error, the eager reference's error, and the error
    allowed.
    """

    op: str
    case: str
    dtype: torch.dtype
    quantity: str
    error: float
    eager_error: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a comparison is about, for its message."""

    op: str
    case: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}, case {self.case!r}, {str(self.dtype).removeprefix('torch.')}"


def compare(
    subject: Subject,
    quantity: str,
    got: torch.Tensor | None,
    eager: torch.Tensor | None,
    exact: torch.Tensor | None,
    *,
    factor: float,
    absolute_floor: float = 0.0,
    truncates: bool = False,
) -> Measurement:
    """Hold `got` against `exact`, allowing `factor` times eager's error plus the floor.

    Args:
        subject: op, case and dtype.
        quantity: e.g. ``"output 0"`` or ``"gradient of weight"``.
        got: the op's tensor.
        eager: the same-dtype reference's tensor.
        exact: the fp64 reference's tensor.
        factor: 2 for outputs, 3 for gradients.
        absolute_floor: added to the floor.
        truncates: bf16 results come from Triton's interpreter.

    Raises:
        AssertionError: a gradient is missing, shape or dtype differ from eager's, NaN stand elsewhere, or the error
            is too large.
    """
    if eager is None or exact is None:
        return Measurement(subject.op, subject.case, subject.dtype, quantity, 0.0, 0.0, 0.0)
    if got is None and not bool(exact.any()):
        return Measurement(
            subject.op, subject.case, subject.dtype, quantity, 0.0, 0.0, 0.0
        )  # autograd's None stands for zeros
    if got is None:
        raise AssertionError(f"{subject}: {quantity} is missing (None); the reference has one")
    if got.shape != eager.shape or got.dtype != eager.dtype:
        raise AssertionError(
            f"{subject}: {quantity} is {tuple(got.shape)} {got.dtype}, "
            f"the reference gives {tuple(eager.shape)} {eager.dtype}"
        )
    if got.numel() == 0:
        return Measurement(subject.op, subject.case, subject.dtype, quantity, 0.0, 0.0, 0.0)
    if not got.is_floating_point():
        if not torch.equal(got, exact.to(got.dtype)):
            raise AssertionError(f"{subject}: {quantity} (integers) differs from the reference")
        return Measurement(subject.op, subject.case, subject.dtype, quantity, 0.0, 0.0, 0.0)
    _same_nonfinite(subject, quantity, got, exact)
    largest, square = _errors(got, exact)
    eager_largest, eager_square = _errors(eager, exact)
    finite = exact[torch.isfinite(exact)].double().abs()
    size = finite.max().item() if finite.numel() else 0.0
    rms = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    allowed = factor * eager_largest + _floor(got.dtype, size, 2.0 if truncates else 0.5) + absolute_floor
    allowed_square = factor * eager_square + _floor(got.dtype, rms, 2.0 if truncates else 0.25) + absolute_floor
    for measure, error, limit, reference in (
        ("largest", largest, allowed, eager_largest),
        ("root-mean-square", square, allowed_square, eager_square),
    ):
        if not error <= limit:
            raise AssertionError(
                f"{subject}: {quantity}: {measure} error {error:.3e} exceeds the allowed {limit:.3e} "
                f"({factor:g} x eager's {reference:.3e} + floor {limit - factor * reference:.1e}; {_worst(got, exact)})"
            )
    return Measurement(subject.op, subject.case, subject.dtype, quantity, largest, eager_largest, allowed)


def _floor(dtype: torch.dtype, size: float, roundings: float) -> float:
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return roundings * torch.finfo(dtype).eps * size + 4 * accumulator * size + 16 * accumulator


def _errors(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    finite = torch.isfinite(exact) & torch.isfinite(value)
    difference = (value.double() - exact.double())[finite]
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def _same_nonfinite(subject: Subject, quantity: str, got: torch.Tensor, exact: torch.Tensor) -> None:
    # A finite fp64 value beyond the dtype's range may round to infinity.
    representable = exact.abs() <= torch.finfo(got.dtype).max
    wrong = (~torch.isfinite(got)) & representable | torch.isfinite(got) & ~torch.isfinite(exact)
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{subject}: {quantity}: {int(wrong.sum())} of {got.numel()} elements are not finite where the fp64 "
            f"reference is, or the other way round; first at {where}: got {got[where].item()}, "
            f"fp64 {exact[where].item():.6g}"
        )


def _worst(got: torch.Tensor, exact: torch.Tensor) -> str:
    difference = torch.nan_to_num((got.double() - exact.double()).abs(), nan=0.0, posinf=0.0)
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"worst at {where}: got {got[where].item():.7g}, fp64 {exact[where].item():.7g}"
