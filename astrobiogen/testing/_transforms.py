"""`check_transforms`: derivatives of every sort are those of the reference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import inputs, tolerance
from astrobiogen.testing._values import FURTHER_DRAWS
from astrobiogen.testing.inputs import Arguments, Function

Tensors = tuple[torch.Tensor, ...]
DRAWS = 2  # members of a batch that vmap makes


@dataclasses.dataclass(frozen=True)
class Call:
    """One function of the differentiable arguments alone, with a point, a direction and weights of the outputs."""

    function: Function
    arguments: Arguments
    names: tuple[str, ...]
    point: Tensors
    direction: Tensors
    weights: Tensors

    def outputs(self, *tensors: torch.Tensor) -> Tensors:
        """The floating-point outputs."""
        results = inputs.as_tuple(self.function(**{**self.arguments, **dict(zip(self.names, tensors))}))
        return tuple(result for result in results if result.is_floating_point())

    def scalar(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The outputs' weighted sum."""
        sums = [(o * w.to(o.dtype)).sum() for o, w in zip(self.outputs(*tensors), self.weights)]
        return torch.stack([one.to(sums[0].dtype) for one in sums]).sum()

    def batch(self) -> Tensors:
        """The point and a step along the direction, stacked."""
        return tuple(torch.stack((p, p + d)) for p, d in zip(self.point, self.direction))

    def leaves(self) -> Tensors:
        """The point as leaves of an autograd graph."""
        return tuple(p.detach().clone().requires_grad_(True) for p in self.point)

    @property
    def every(self) -> tuple[int, ...]:
        """`argnums` of all differentiable arguments."""
        return tuple(range(len(self.names)))


def grad(call: Call) -> Any:
    """`torch.func.grad`."""
    return torch.func.grad(call.scalar, call.every)(*call.point)


def vjp(call: Call) -> Any:
    """`torch.func.vjp`."""
    outputs, pull, *_ = torch.func.vjp(call.outputs, *call.point)
    return outputs, pull(tuple(w.to(o.dtype) for o, w in zip(outputs, call.weights)))


def jvp(call: Call) -> Any:
    """`torch.func.jvp`."""
    return torch.func.jvp(call.outputs, call.point, call.direction)


def vmap(call: Call) -> Any:
    """`torch.func.vmap` over all differentiable arguments."""
    return torch.func.vmap(call.outputs)(*call.batch())


def vmap_one(call: Call) -> Any:
    """`torch.func.vmap` over the first differentiable argument, at its last axis."""
    first = torch.stack((call.point[0], call.point[0] + call.direction[0]), dim=-1)
    where = (-1, *[None] * (len(call.point) - 1))
    return torch.func.vmap(call.outputs, in_dims=where)(first, *call.point[1:])


def vmap_every_tensor(call: Call) -> Any:
    """`torch.func.vmap` over every tensor argument, indices and tables too."""
    tensors = {name: value for name, value in call.arguments.items() if isinstance(value, torch.Tensor)}
    stacked = {name: torch.stack([value] * DRAWS) for name, value in tensors.items()}

    def run(batch: Arguments) -> Any:
        return call.function(**{**call.arguments, **batch})

    return torch.func.vmap(run)(stacked)


def per_sample_gradients(call: Call) -> Any:
    """`vmap(grad(...))`."""
    return torch.func.vmap(torch.func.grad(call.scalar, call.every))(*call.batch())


def jacfwd(call: Call) -> Any:
    """`torch.func.jacfwd`."""
    return torch.func.jacfwd(call.outputs, call.every)(*call.point)


def jacrev(call: Call) -> Any:
    """`torch.func.jacrev`."""
    return torch.func.jacrev(call.outputs, call.every)(*call.point)


def hessian(call: Call) -> Any:
    """`torch.func.hessian`."""
    return torch.func.hessian(call.scalar, call.every)(*call.point)


def forward_mode(call: Call) -> Any:
    """`torch.autograd.forward_ad` without `torch.func`."""
    with forward_ad.dual_level():
        outputs = call.outputs(*(forward_ad.make_dual(p, d) for p, d in zip(call.point, call.direction)))
        return [_tangent(output) for output in outputs]


def forward_over_reverse(call: Call) -> Any:
    """A forward-mode derivative of a gradient taken by `torch.autograd.grad`."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, d) for p, d in zip(call.leaves(), call.direction)]
        gradients = torch.autograd.grad(call.scalar(*duals), duals, allow_unused=True, materialize_grads=True)
        return [_tangent(gradient) for gradient in gradients]


def vmap_then_backward(call: Call) -> Any:
    """`torch.autograd.grad` through the result of a vmap."""
    batch = tuple(b.requires_grad_(True) for b in call.batch())
    outputs = torch.func.vmap(call.outputs)(*batch)
    weights = [w.to(o.dtype).expand(o.shape) for o, w in zip(outputs, call.weights)]
    return torch.autograd.grad(outputs, batch, weights, allow_unused=True, materialize_grads=True)


def batched_gradients(call: Call) -> Any:
    """`torch.autograd.grad(is_grads_batched=True)`."""
    leaves = call.leaves()
    outputs = call.outputs(*leaves)
    weights = [torch.stack((w, 2 * w)).to(o.dtype) for o, w in zip(outputs, call.weights)]
    options = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outputs, leaves, weights, **options)


TRANSFORMS: tuple[Callable[[Call], Any], ...] = (
    grad,
    vjp,
    jvp,
    vmap,
    vmap_one,
    vmap_every_tensor,
    per_sample_gradients,
    jacfwd,
    jacrev,
    hessian,
    forward_mode,
    forward_over_reverse,
    vmap_then_backward,
    batched_gradients,
)


def check_transforms(
    function: Function, reference: Function, case: Case, *, device: str | torch.device = "cpu"
) -> list[tolerance.Measurement]:
    """Every transform of `TRANSFORMS` gives for `function` what it gives for `reference` (fp32, held against fp64 by
    the error rule of gradients).

    Args:
        function: the public function.
        reference: its plain PyTorch definition.
        case: a small one: Jacobians and Hessians are formed whole.
        device: of the arguments.

    Raises:
        AssertionError: a value is wrong, or the transform does not work on `function` though it does on `reference`.
    """
    measurements: list[tolerance.Measurement] = []
    for transform in TRANSFORMS:
        subject = tolerance.Subject(f"{transform.__name__} of {inputs.name_of(function)}", case.name, torch.float32)
        call = _call(function, case, device)
        plain = dataclasses.replace(call, function=reference)
        try:
            eager, exact = _flat(transform(plain)), _flat(transform(_wide(plain)))
        except RuntimeError as error:  # one of PyTorch's own operators has no such rule
            _must_refuse(subject, transform, call, error)
            continue
        try:
            got = _flat(transform(call))
        except Exception as error:
            raise AssertionError(f"{subject}: {type(error).__name__}: {error}") from error
        if len(got) != len(eager):
            raise AssertionError(f"{subject}: {len(got)} results, the reference gives {len(eager)}")
        measurements += [
            tolerance.compare(
                subject,
                f"result {i}",
                *triple,
                factor=tolerance.GRADIENT_FACTOR,
                further=_further(transform, reference, case, device, i),
            )
            for i, triple in enumerate(zip(got, eager, exact))
        ]
    return measurements


def _further(
    transform: Callable[[Call], Any], reference: Function, case: Case, device: str | torch.device, number: int
) -> Callable[[], tuple[float, float]]:
    """Eager's largest errors in result `number` on further draws of the case."""

    def measure() -> tuple[float, float]:
        found = [(0.0, 0.0)]
        for draw in range(1, FURTHER_DRAWS + 1):
            call = _call(reference, case, device, 1000 * draw)
            found.append(tolerance.errors(_flat(transform(call))[number], _flat(transform(_wide(call)))[number]))
        return max(largest for largest, _ in found), max(square for _, square in found)

    return measure


def _must_refuse(
    subject: tolerance.Subject, transform: Callable[[Call], Any], call: Call, reason: RuntimeError
) -> None:
    try:
        transform(call)
    except RuntimeError:
        return
    raise AssertionError(f"{subject}: gives values though the reference refuses: {reason}")


def _call(function: Function, case: Case, device: str | torch.device, seed: int = 0) -> Call:
    arguments = inputs.build(case, torch.float32, device, seed)
    maker = inputs.maker(torch.float32, device, seed + 7)
    point = tuple(arguments[name].detach().clone() for name in case.differentiable)
    direction = tuple(maker.randn(*p.shape) for p in point)
    call = Call(function, arguments, case.differentiable, point, direction, ())
    return dataclasses.replace(call, weights=tuple(maker.randn(*o.shape) for o in call.outputs(*point)))


def _wide(call: Call) -> Call:
    def double(tensors: Tensors) -> Tensors:
        return tuple(t.double() for t in tensors)

    point, direction, weights = double(call.point), double(call.direction), double(call.weights)
    arguments = inputs.upcast(call.arguments)
    return dataclasses.replace(call, arguments=arguments, point=point, direction=direction, weights=weights)


def _flat(results: Any) -> list[torch.Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def _tangent(tensor: torch.Tensor) -> torch.Tensor:
    tangent = forward_ad.unpack_dual(tensor).tangent
    return torch.zeros_like(tensor) if tangent is None else tangent
