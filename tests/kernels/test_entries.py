"""The short ways into the CPU kernels: they take plain calls that fit, and leave everything else to the checks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from astrobiogen import ops
from tests.test_structure import ROOT

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")

# Shapes of the arguments that every short way takes.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((3, 4), (5, 4), (5,)),
    "swiglu": ((3, 4), (3, 4)),
    "swiglu_packed": ((3, 4),),
    "swiglu_mlp": ((3, 4), (5, 4), (5, 4), (4, 5)),
}


class Subclass(torch.Tensor):
    """A tensor that may do anything."""


class Watching(TorchFunctionMode):
    """Does nothing, but may see every function's call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*args, **(kwargs or {}))


def tensors(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES[name]]


def test_every_short_way_is_known_here() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    assert text.count("const entry::Entry ") == len(SHAPES)
    assert all(callable(getattr(extension, name)) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_public_function(name: str, dtype: torch.dtype) -> None:
    given = [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors(name)]
    found = getattr(extension, name)(*given)
    with Watching():  # takes the long way
        expected = getattr(ops, name)(*given)
    assert torch.equal(found, expected)
    found = torch.autograd.grad(found, given, torch.ones_like(found))
    assert all(map(torch.equal, found, torch.autograd.grad(expected, given, torch.ones_like(expected))))


@pytest.mark.parametrize("name", SHAPES)
def test_no_gradient_is_kept_where_none_is_asked_for(name: str) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(name)]
    with torch.no_grad():
        assert not getattr(extension, name)(*given).requires_grad
    with torch.inference_mode():
        assert getattr(extension, name)(*given).is_inference()
    assert not getattr(extension, name)(*(tensor.detach() for tensor in given)).requires_grad


def misfits(given: list[torch.Tensor]) -> Iterator[list[Any]]:
    """Calls that each have one argument that a short way must not take."""
    others: tuple[Callable[[torch.Tensor], Any], ...] = (
        lambda tensor: tensor.long(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.as_subclass(Subclass),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch._neg_view(tensor),
        lambda tensor: tensor.tolist(),
        lambda tensor: str(tensor),
    )
    for place in range(len(given)):
        for other in others:
            yield [*given[:place], other(given[place]), *given[place + 1 :]]
        if len(given) > 1:
            yield [*given[:place], given[place].double(), *given[place + 1 :]]
            yield [*given[:place], given[place][..., 1:], *given[place + 1 :]]
            yield [*given[:place], given[place].sum(), *given[place + 1 :]]
    yield given[1:]
    yield [*given, given[0]]


@pytest.mark.parametrize("name", SHAPES)
def test_what_does_not_fit_is_left_to_the_checks(name: str) -> None:
    for call in misfits(tensors(name)):
        assert getattr(extension, name)(*call) is None


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function mode": Watching,
    "fake tensors": lambda: torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_must_see_a_call_sees_it(name: str, context: str) -> None:
    given = tensors(name)
    with CONTEXTS[context]():
        assert getattr(extension, name)(*given) is None


@pytest.mark.parametrize("name", SHAPES)
def test_transforms_and_traces_take_the_long_way(name: str) -> None:
    entry, seen = getattr(extension, name), []

    def call(*given: torch.Tensor) -> torch.Tensor:
        seen.append(entry(*given))
        return given[0].sum()

    torch.func.vmap(call)(*(tensor[None] for tensor in tensors(name)))
    torch.func.grad(call)(*tensors(name))
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.trace(call, tuple(tensors(name)), check_trace=False)
    assert seen
    assert all(result is None for result in seen)


@pytest.mark.parametrize("name", SHAPES)
def test_a_tangent_of_the_upstream_gradient_is_not_lost(name: str) -> None:
    """The backward ops are called past autograd's rules, unless one of them has something to do."""
    given = [tensor.requires_grad_() for tensor in tensors(name)]
    out = getattr(ops, name)(*given)
    upstream, tangent = torch.randn_like(out), torch.randn_like(out)
    expected = torch.autograd.grad(out, given, tangent, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(out, given, forward_ad.make_dual(upstream, tangent))
        slopes = [forward_ad.unpack_dual(gradient).tangent for gradient in found]
    torch.testing.assert_close(slopes, list(expected))  # a gradient is linear in the upstream one
