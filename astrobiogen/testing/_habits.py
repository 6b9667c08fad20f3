"""`check_habits`: what training code does to a graph, its leaves and its saved tensors, beside running it once."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from astrobiogen.kernels.cases import Case
from astrobiogen.testing import inputs
from astrobiogen.testing.inputs import Function

Gradients = list[torch.Tensor | None]


class _Run:
    """A case as a loss of its differentiable arguments."""

    def __init__(self, function: Function, case: Case, dtype: torch.dtype, device: str | torch.device) -> None:
        self.function = function
        self.arguments = inputs.build(case, dtype, device)
        self.names = case.differentiable
        outputs = inputs.evaluate(function, self.arguments, (), []).outputs
        self.upstream = inputs.draw_upstream(case, outputs)

    def leaves(self) -> list[torch.Tensor]:
        """Fresh leaves with the case's values and strides."""
        return [self.arguments[name].detach().clone().requires_grad_(True) for name in self.names]

    def outputs(self, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs that a gradient comes back through."""
        results = inputs.as_tuple(self.function(**{**self.arguments, **dict(zip(self.names, leaves))}))
        return tuple(o for o, u in zip(results, self.upstream) if u is not None)

    def weights(self) -> list[torch.Tensor]:
        """The gradients that come back."""
        return [u for u in self.upstream if u is not None]

    def backward(self, outputs: tuple[torch.Tensor, ...], **options: Any) -> None:
        """`torch.autograd.backward`."""
        torch.autograd.backward(list(outputs), self.weights(), **options)

    def gradients(self, leaves: list[torch.Tensor], outputs: tuple[torch.Tensor, ...], **options: Any) -> Gradients:
        """`torch.autograd.grad`."""
        return list(torch.autograd.grad(list(outputs), leaves, self.weights(), allow_unused=True, **options))

    def expected(self) -> Gradients:
        """Gradients of one plain run."""
        leaves = self.leaves()
        return self.gradients(leaves, self.outputs(leaves))


def _repeated_backward(run: _Run) -> list[Gradients]:
    """`.grad.zero_()` between two runs of one graph."""
    leaves = run.leaves()
    outputs = run.outputs(leaves)
    results: list[Gradients] = []
    for keep in (True, True, False):
        run.backward(outputs, retain_graph=keep)
        results.append([None if leaf.grad is None else leaf.grad.clone() for leaf in leaves])
        for leaf in leaves:
            if leaf.grad is not None:
                leaf.grad.zero_()
    return results


def _results_have_own_memory(run: _Run) -> list[Gradients]:
    """Overwriting the first result of one graph does not reach the second."""
    leaves = run.leaves()
    outputs = run.outputs(leaves)
    first = run.gradients(leaves, outputs, retain_graph=True)
    second = run.gradients(leaves, outputs, retain_graph=True)
    kept = [None if g is None else g.clone() for g in second]
    for gradient in first:
        if gradient is not None:
            gradient.fill_(float("nan"))
    for number, (left, right) in enumerate(zip(kept, second)):
        if left is not None and right is not None and not inputs.same_bits(left, right):
            raise AssertionError(f"gradient {number} of two runs of one graph shares memory")
    return [kept, run.gradients(leaves, outputs)]


def _accumulation(run: _Run) -> list[Gradients]:
    """Two micro-batches into one `.grad`: half of it is the gradient of each."""
    leaves = run.leaves()
    for _ in range(2):
        run.backward(run.outputs(leaves))
    return [[None if leaf.grad is None else leaf.grad / 2 for leaf in leaves]]


def _data_writes(run: _Run) -> list[Gradients]:
    """A write through `.data` between two steps, as an optimizer makes it: nothing of the old values is kept."""
    leaves = run.leaves()
    values = [leaf.detach().clone() for leaf in leaves]
    for leaf in leaves:
        leaf.data.mul_(0.5)
    run.backward(run.outputs(leaves))
    for leaf, value in zip(leaves, values):
        leaf.data.copy_(value)
        leaf.grad = None
    run.backward(run.outputs(leaves))
    return [[leaf.grad for leaf in leaves]]


def _saved_tensor_hooks(run: _Run) -> list[Gradients]:
    """Saved tensors that come back as copies, as after offloading."""
    leaves = run.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
        outputs = run.outputs(leaves)
    return [run.gradients(leaves, outputs)]


def _checkpointing(run: _Run, *, reentrant: bool) -> list[Gradients]:
    leaves = run.leaves()
    outputs = checkpoint(lambda *tensors: run.outputs(list(tensors)), *leaves, use_reentrant=reentrant)
    if not reentrant:
        return [run.gradients(leaves, outputs)]
    run.backward(outputs)  # torch.autograd.grad is refused there
    return [[leaf.grad for leaf in leaves]]


def _checkpointing_saves_nothing(run: _Run) -> list[Gradients]:
    """`torch.utils.checkpoint` without reentrance."""
    return _checkpointing(run, reentrant=False)


def _checkpointing_runs_again(run: _Run) -> list[Gradients]:
    """`torch.utils.checkpoint`, the reentrant kind."""
    return _checkpointing(run, reentrant=True)


HABITS: tuple[Callable[[_Run], list[Gradients]], ...] = (
    _repeated_backward,
    _results_have_own_memory,
    _accumulation,
    _data_writes,
    _saved_tensor_hooks,
    _checkpointing_saves_nothing,
    _checkpointing_runs_again,
)


def check_habits(
    function: Function, case: Case, dtype: torch.dtype = torch.float32, *, device: str | torch.device = "cpu"
) -> None:
    """Every habit of `HABITS` gives the gradients of one plain run.

    They may differ by the rounding of another order of sums where a graph's second run takes another way: by eight eps
    of the gradient's largest entry; everything else is far off.

    Raises:
        AssertionError: a habit raises, or gives other gradients.
    """
    run = _Run(function, case, dtype, device)
    expected = run.expected()
    for habit in HABITS:
        subject = f"{inputs.name_of(function)}, case {case.name!r}, {dtype}: {habit.__name__.strip('_')}"
        try:
            results = habit(run)
        except Exception as error:
            raise AssertionError(f"{subject}: {error}") from error
        for number, result in enumerate(results):
            for name, got, wanted in zip(run.names, result, expected):
                _compare(f"{subject}: run {number}, gradient of {name}", got, wanted)


def _compare(label: str, got: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    if wanted is None:  # a run that accumulates may leave zeros where autograd gives None
        if got is not None and bool(got.any()):
            raise AssertionError(f"{label}: {got}, a plain run gives None")
        return
    if got is None or got.shape != wanted.shape:
        raise AssertionError(f"{label}: {None if got is None else tuple(got.shape)}, expected {tuple(wanted.shape)}")
    limit = 8 * torch.finfo(wanted.dtype).eps * wanted.abs().max().item() if wanted.numel() else 0.0
    worst = (got - wanted).abs().max().item() if wanted.numel() else 0.0
    if not worst <= limit:
        raise AssertionError(f"{label}: differs from a plain run by {worst:.3e}, allowed {limit:.3e}")
