"""The error rule: an op may be at most twice (gradients: three times) as far from the fp64 result as the eager
reference is.

Errors are measured twice, as the largest and as the root-mean-square difference: the first finds a single wrong
element, the second an accumulator that is too narrow. A floor keeps the rule meaningful where eager happens to be
exact:

    floor = 1/2 eps(result dtype) * size  +  4 eps(fp32) * size  +  smallest

with `size` the largest (root-mean-square) magnitude of the fp64 result: one rounding of the result (half a unit in
the last place; 1/4 for the root mean square, since rounding errors are spread evenly) and a few roundings of the
accumulator; `smallest` is the rounding of a result that is subnormal in its dtype (half of that dtype's smallest
number), and the smallest normal fp32 number, since a kernel may flush what is below. For fp64 results eps(fp64) takes
the place of eps(fp32).

Every term is relative to the tensor's own scale: no constant would do, since gradients of a mean over 10^4 tokens are
10^4 times smaller than those of a sum, and a thousandth of them is as wrong. Where the result is small because it
*cancels*, what rounds is not the result but its summands, and no floor made from the result can know their size. Eager
rounds the same summands, so its own error measures them, as one sample per element; a tensor of few elements may have
been lucky in all of them. Therefore, before an op is judged worse than eager, eager's error is measured on further
draws of the same case (`further`), and the largest counts.

Triton's interpreter cuts fp32 off to bf16 where a GPU rounds to the nearest (Triton 3.7.1), with every stored value:
there the first term is 2 eps(bf16) * size for both measures. On a GPU the rule is the strict one.
"""

import dataclasses
from collections.abc import Callable

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
    further: Callable[[], tuple[float, float]] | None = None,
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
        further: eager's errors (largest, root-mean-square) on further draws; called only where the first draw's would
            not do.

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
    found, eager_found = errors(got, exact), errors(eager, exact)
    floors = _floors(got.dtype, exact, truncates)
    limits = [factor * reference + floor + absolute_floor for reference, floor in zip(eager_found, floors)]
    if further is not None and not all(error <= limit for error, limit in zip(found, limits)):
        eager_found = tuple(map(max, eager_found, further()))
        limits = [factor * reference + floor + absolute_floor for reference, floor in zip(eager_found, floors)]
    for measure, error, limit, reference in zip(("largest", "root-mean-square"), found, limits, eager_found):
        if not error <= limit:
            raise AssertionError(
                f"{subject}: {quantity}: {measure} error {error:.3e} exceeds the allowed {limit:.3e} "
                f"({factor:g} x eager's {reference:.3e} + floor {limit - factor * reference:.1e}; {_worst(got, exact)})"
            )
    return Measurement(subject.op, subject.case, subject.dtype, quantity, found[0], eager_found[0], limits[0])


def errors(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The largest and the root-mean-square difference of two tensors, where both are finite."""
    finite = torch.isfinite(exact) & torch.isfinite(value)
    difference = (value.double() - exact.double())[finite]
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def _floors(dtype: torch.dtype, exact: torch.Tensor, truncates: bool) -> tuple[float, float]:
    """The floors of the largest and of the root-mean-square error."""
    finite = exact[torch.isfinite(exact)].double().abs()
    if finite.numel() == 0:
        return 0.0, 0.0
    result, accumulator = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    smallest = 0.5 * result.smallest_normal * result.eps + accumulator.smallest_normal
    sizes = (finite.max().item(), finite.square().mean().sqrt().item())
    roundings = (2.0, 2.0) if truncates else (0.5, 0.25)
    largest, square = ((r * result.eps + 4 * accumulator.eps) * size + smallest for r, size in zip(roundings, sizes))
    return largest, square


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
