"""`check_op`: values, gradients, purity, repeatability, and memory that the kernel must neither read nor write."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import _routes, inputs, tolerance
from astrobiogen.testing.inputs import Arguments, Function, Guard, Result
from astrobiogen.testing.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, Measurement, Subject

# Draws of a case on which eager is measured once more before an op is called worse. Of errors spread evenly in
# +-e, the largest of 1 + 8 is below e / 3 in 5 cases of 100,000.
FURTHER_DRAWS = 8


def check_op(
    function: Function,
    reference: Function,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    ops: Sequence[str] = (),
    implementation: _routes.Implementation = "default",
    seed: int = 0,
    absolute_floor: float = 0.0,
) -> list[Measurement]:
    """Hold one op against its reference on one case.

    The op's inputs and upstream gradients lie in NaN-filled buffers, and fresh memory (`empty`, in Python and in
    C++) is NaN. Checked:

    * values and gradients: error against the fp64 reference at most 2x (3x) that of the same-dtype eager reference
      plus a floor (see `astrobiogen.testing.tolerance`); shapes and dtypes as the reference's;
    * a second run gives the same bits;
    * inputs, upstream gradients and the memory around them keep their bits;
    * once more with element-aligned addresses and, for each output alone, an expanded (stride 0) upstream gradient.

    Args:
        function: the public function; takes the case's arguments by name.
        reference: the plain PyTorch definition, same arguments and results.
        case: from the op's `samples.py`.
        dtype: of the case's tensors.
        device: where to run; `implementation="triton"` decides for itself.
        ops: names of the registered ops that `function` calls, forward and backward; needed for "cpu" and "triton".
        implementation: "default" the dispatcher's choice, "cpu" the C++ kernels, "triton" the Triton kernels, on the
            GPU or under the interpreter, "sm_80", "sm_86" or "sm_89" the compiled ones on the emulator.
        seed: of the case's random numbers.
        absolute_floor: added to every allowed error; state the reason where you use it.

    Returns:
        One `Measurement` per output and gradient.

    Raises:
        AssertionError: a check failed; the message has op, case, dtype, and measured against allowed.
    """
    where = _routes.device_of(implementation, device)
    subject = Subject(f"{inputs.name_of(function)} [{implementation}, {where.type}]", case.name, dtype)
    arguments = inputs.build(case, dtype, where, seed)
    stood_in = implementation in ("triton", *_routes.EMULATED) and where.type == "cpu"
    truncates = stood_in and implementation == "triton" and dtype == torch.bfloat16
    judge = _Judge(subject, reference, arguments, case, absolute_floor, truncates, where, seed)
    plain = judge.reference_outputs()
    with _routes.route(ops, implementation) as calls:
        measurements = _check_dense(judge, function, inputs.draw_upstream(case, plain))
        outputs = (
            [index for index, output in enumerate(plain) if output.is_floating_point()] if case.differentiable else []
        )
        for only in outputs or [None]:
            upstream = inputs.draw_upstream(case, plain, only=only, expanded=True, seed=100)
            got, guards = _run(function, arguments, case, upstream, inputs.UNALIGNED_MARGIN)
            _check_pure(subject, guards)
            judge.compare(got, upstream, f", unaligned, only output {only} used" if len(outputs) > 1 else ", unaligned")
        if stood_in and not calls and any(o.numel() for o in plain):
            raise AssertionError(f"{subject}: no Triton launcher was reached; `ops` names {tuple(ops)}")
    return measurements


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, `empty` in Python and `at::empty` in C++ return NaN (integers: the largest number), on CPU and CUDA."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    try:
        with warnings.catch_warnings():
            # The deterministic mode serves only to fill memory: an op that has no deterministic variant is no fault
            # here.
            warnings.filterwarnings("ignore", message="(?s).*does not have a deterministic implementation")
            warnings.filterwarnings("ignore", message="(?s).*Deterministic behavior was enabled")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(filled)


class _Judge:
    """Evaluates the reference in fp64 and in the case's own dtype, and holds results against both."""

    def __init__(
        self,
        subject: Subject,
        reference: Function,
        arguments: Arguments,
        case: Case,
        absolute_floor: float,
        truncates: bool,
        device: torch.device,
        seed: int,
    ) -> None:
        self.subject = subject
        self.reference = reference
        self.arguments = arguments
        self.case = case
        self.absolute_floor = absolute_floor
        self.truncates = truncates
        self.device = device
        self.seed = seed

    def reference_outputs(self) -> tuple[torch.Tensor, ...]:
        """The same-dtype reference's outputs."""
        return inputs.evaluate(self.reference, self.arguments, (), []).outputs

    def compare(self, got: Result, upstream: Sequence[torch.Tensor | None], remark: str = "") -> list[Measurement]:
        """Apply the error rule to every output and gradient of `got`."""
        names = self.case.differentiable
        eager, exact = self._references(self.arguments, upstream)
        if len(got.outputs) != len(eager.outputs):
            raise AssertionError(
                f"{self.subject}: {len(got.outputs)} outputs, the reference gives {len(eager.outputs)}"
            )
        checks = [
            (f"output {i}", FORWARD_FACTOR, *triple, self._further(upstream, lambda result, i=i: result.outputs[i]))
            for i, triple in enumerate(zip(got.outputs, eager.outputs, exact.outputs))
        ]
        checks += [
            (
                f"gradient of {n}",
                GRADIENT_FACTOR,
                *(result.gradients.get(n) for result in (got, eager, exact)),
                self._further(upstream, lambda result, n=n: result.gradients.get(n)),
            )
            for n in names
        ]
        return [
            tolerance.compare(
                self.subject,
                quantity + remark,
                *triple,
                factor=factor,
                absolute_floor=self.absolute_floor,
                truncates=self.truncates,
                further=further,
            )
            for quantity, factor, *triple, further in checks
        ]

    def _references(self, arguments: Arguments, upstream: Sequence[torch.Tensor | None]) -> tuple[Result, Result]:
        """Eager's result and the fp64 one."""
        names = self.case.differentiable
        wide = [gradient.double() if gradient is not None else None for gradient in upstream]
        eager = inputs.evaluate(self.reference, arguments, names, upstream)
        return eager, inputs.evaluate(self.reference, inputs.upcast(arguments), names, wide)

    def _further(
        self, upstream: Sequence[torch.Tensor | None], choose: Callable[[Result], torch.Tensor | None]
    ) -> Callable[[], tuple[float, float]]:
        """Eager's largest errors on further draws of the case, of the quantity that `choose` takes from a result."""

        def measure() -> tuple[float, float]:
            found = [(0.0, 0.0)]
            for draw in range(1, FURTHER_DRAWS + 1):
                arguments = inputs.build(self.case, self.subject.dtype, self.device, self.seed + 1000 * draw)
                eager, exact = (choose(result) for result in self._references(arguments, upstream))
                if eager is not None and exact is not None and eager.shape == exact.shape:
                    found.append(tolerance.errors(eager, exact))
            return max(largest for largest, _ in found), max(square for _, square in found)

        return measure


def _check_dense(judge: _Judge, function: Function, upstream: list[torch.Tensor | None]) -> list[Measurement]:
    with poisoned_empty():
        first, guards = _run(function, judge.arguments, judge.case, upstream, inputs.ALIGNED_MARGIN)
        _check_pure(judge.subject, guards)
        second, _ = _run(function, judge.arguments, judge.case, upstream, inputs.ALIGNED_MARGIN)
    measurements = judge.compare(first, upstream)
    _check_same(judge.subject, first, second)
    return measurements


def _run(
    function: Function, arguments: Arguments, case: Case, upstream: Sequence[torch.Tensor | None], margin: int
) -> tuple[Result, list[Guard]]:
    guarded, guards = inputs.guard_all(arguments, margin)
    pulled: list[torch.Tensor | None] = []
    for index, gradient in enumerate(upstream):
        if gradient is None:
            pulled.append(None)
            continue
        guards.append(inputs.guard(f"upstream gradient {index}", gradient, margin))
        pulled.append(guards[-1].tensor)
    return inputs.evaluate(function, guarded, case.differentiable, pulled), guards


def _check_pure(subject: Subject, guards: list[Guard]) -> None:
    for item in guards:
        if item.changed():
            raise AssertionError(f"{subject}: {item.name} was written to (the tensor or the memory around it)")


def _check_same(subject: Subject, first: Result, second: Result) -> None:
    for index, (left, right) in enumerate(zip(first.outputs, second.outputs)):
        if not inputs.same_bits(left, right):
            raise AssertionError(f"{subject}: output {index} differs between two runs{_difference(left, right)}")
    for name, left in first.gradients.items():
        right = second.gradients[name]
        if left is not None and right is not None and not inputs.same_bits(left, right):
            raise AssertionError(f"{subject}: gradient of {name} differs between two runs{_difference(left, right)}")


def _difference(left: torch.Tensor, right: torch.Tensor) -> str:
    if not left.is_floating_point():
        return ""
    return f": by {(left.double() - right.double()).abs().nan_to_num().max().item():.3e}; allowed is no bit"
