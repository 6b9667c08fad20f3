"""What PyTorch demands of an operator: `torch.library.opcheck` and `torch.compile(fullgraph=True)`."""

import dataclasses
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from astrobiogen.kernels import registry
from astrobiogen.kernels.cases import Case
from astrobiogen.testing import inputs, tolerance
from astrobiogen.testing.inputs import Function

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclasses.dataclass(frozen=True)
class _Call:
    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(TorchDispatchMode):
    """Notes every call of one of our ops with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == registry.NAMESPACE:
            self.calls.append(_Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_opcheck(
    function: Function | torch._ops.OpOverload,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
) -> list[str]:
    """All four `torch.library.opcheck` utilities on every op of ours that `function` calls, forward and backward.

    Args:
        function: the public function (its op calls are recorded and checked one by one), or one op overload, e.g.
            ``torch.ops.astrobiogen.rms_norm.default``, that takes the case's arguments by name.
        case: the arguments.
        dtype: of the arguments.
        device: of the arguments.

    Returns:
        The names of the ops that were checked.

    Raises:
        AssertionError: a utility found a fault, or `function` called no op of ours.
    """
    arguments = inputs.build(case, dtype, device)
    if isinstance(function, torch._ops.OpOverload):
        leaves = {name: arguments[name].detach().requires_grad_(True) for name in case.differentiable}
        calls = [_Call(function, (), {**arguments, **leaves})]
    else:
        calls = _record(function, case, arguments)
    if not calls:
        raise AssertionError(f"{inputs.name_of(function)}, case {case.name!r}: no {registry.NAMESPACE} op was called")
    for call in calls:
        try:
            torch.library.opcheck(call.op, call.args, call.kwargs, test_utils=UTILITIES)
        except Exception as error:
            raise AssertionError(f"{call.op}, case {case.name!r}, {dtype}: opcheck: {error}") from error
    return [str(call.op) for call in calls]


def check_fullgraph(
    function: Function, case: Case, dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu"
) -> None:
    """`torch.compile(fullgraph=True, backend="aot_eager")` gives the eager call's values and gradients, with no
    graph break.

    Raises:
        AssertionError: the graph breaks, or a result differs by more than the floor of the error rule.
    """
    subject = tolerance.Subject(f"torch.compile({inputs.name_of(function)})", case.name, dtype)
    arguments = inputs.build(case, dtype, device)
    outputs = inputs.evaluate(function, arguments, (), []).outputs
    upstream = inputs.draw_upstream(case, outputs)
    eager = inputs.evaluate(function, arguments, case.differentiable, upstream)
    torch.compiler.reset()
    try:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got = inputs.evaluate(compiled, arguments, case.differentiable, upstream)
    except RuntimeError as error:
        raise AssertionError(f"{subject}: {error}") from error
    finally:
        torch.compiler.reset()
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got.outputs, eager.outputs))]
    pairs += [(f"gradient of {name}", got.gradients[name], eager.gradients[name]) for name in eager.gradients]
    for quantity, value, expected in pairs:
        tolerance.compare(subject, quantity, value, expected, expected, factor=1.0)


def _record(function: Function, case: Case, arguments: inputs.Arguments) -> list[_Call]:
    leaves = {name: arguments[name].detach().requires_grad_(True) for name in case.differentiable}
    with _Recorder() as forward:
        outputs = inputs.as_tuple(function(**{**arguments, **leaves}))
    upstream = inputs.draw_upstream(case, outputs)
    pairs = [(o, g) for o, g in zip(outputs, upstream) if g is not None and o.requires_grad]
    with _Recorder() as backward:
        if pairs:
            torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    # A backward op is checked without gradients of its own: most refuse a second derivative.
    return [_leaf_call(call, grad=True) for call in forward.calls] + [
        _leaf_call(call, grad=False) for call in backward.calls
    ]


def _leaf_call(call: _Call, *, grad: bool) -> _Call:
    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().requires_grad_(grad and value.requires_grad)

    return _Call(call.op, tuple(leaf(a) for a in call.args), {name: leaf(a) for name, a in call.kwargs.items()})
