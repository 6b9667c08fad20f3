"""A module evaluated three times, with kernels, with plain PyTorch and in fp64, and held against itself."""

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from astrobiogen.kernels.registry import use_kernels
from astrobiogen.testing import tolerance
from astrobiogen.testing.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, Measurement, Subject

Tensors = dict[str, torch.Tensor]
# (module, its inputs) -> results by name; those that need a gradient are differentiated.
Call = Callable[[nn.Module, Any], Mapping[str, torch.Tensor]]
FURTHER_DRAWS = 4  # seeds on which eager is measured again before a module is called worse


def evaluated(
    module: nn.Module, inputs: Any, call: Call, kernels: bool, autocast: torch.dtype | None = None
) -> Tensors:
    """Results, and gradients of parameters and of inputs in a tuple, named "gradient of ...", for upstream gradients
    from a fixed seed."""
    module.zero_grad(set_to_none=True)
    leaves: Tensors = {}
    if isinstance(inputs, tuple):
        inputs = tuple(value.detach().requires_grad_(value.is_floating_point()) for value in inputs)
        leaves = {f"input {place}": value for place, value in enumerate(inputs)}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    lowered = torch.autocast(device.type, dtype=autocast) if autocast is not None else contextlib.nullcontext()
    with contextlib.nullcontext() if kernels else use_kernels("reference"), lowered:
        results = dict(call(module, inputs))
    generator = torch.Generator().manual_seed(1)
    roots, upstream = [], []
    for value in results.values():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.requires_grad:
            roots.append(value)
            upstream.append(weight.to(value))
    torch.autograd.backward(roots, upstream)
    leaves |= dict(module.named_parameters())
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach() for name, value in results.items()} | gradients


def doubled(value: Any) -> Any:
    """`value` with every floating-point tensor in fp64, in dictionaries, tuples and graphs too."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(doubled(item) for item in value)
    return value.clone().apply(doubled) if hasattr(value, "edge_index") else value


def three(
    module: nn.Module,
    inputs: Any,
    call: Call,
    autocast: torch.dtype | None = None,
    plain: nn.Module | None = None,
) -> tuple[Tensors, Tensors, Tensors]:
    """With kernels, with plain PyTorch, with plain PyTorch in fp64; one set of weights.

    Plain PyTorch is `plain`, a layer of `torch.nn` with the same parameters, or `module` by the operators' references.
    """
    exact = evaluated(copy.deepcopy(module).double(), doubled(inputs), call, kernels=False)
    eager = evaluated(plain or module, inputs, call, kernels=False, autocast=autocast)
    return evaluated(module, inputs, call, kernels=True, autocast=autocast), eager, exact


def compare(
    subject: Subject, draw: Callable[[int], tuple[Tensors, Tensors, Tensors]], absolute_floor: float = 0.0
) -> tuple[list[Measurement], list[str]]:
    """Measurements of draw 0 by the rule of `astrobiogen.testing.tolerance`, and what failed in words.

    Args:
        subject: what is compared.
        draw: seed -> (with kernels, eager, fp64); further seeds are asked where eager of seed 0 may have been lucky.
        absolute_floor: see `tolerance.compare`.
    """
    fused, eager, exact = draw(0)
    others: list[tuple[Tensors, Tensors, Tensors]] = []

    def further(name: str) -> tuple[float, float]:
        if not others:
            others.extend(draw(seed) for seed in range(1, FURTHER_DRAWS + 1))
        pairs = [tolerance.errors(one[name], true[name]) for _, one, true in others]
        return max(largest for largest, _ in pairs), max(square for _, square in pairs)

    found, failures = [], []
    for name in exact:
        factor = GRADIENT_FACTOR if name.startswith("gradient") else FORWARD_FACTOR
        more = functools.partial(further, name)
        triple = fused.get(name), eager.get(name), exact[name]
        try:
            one = tolerance.compare(subject, name, *triple, factor=factor, absolute_floor=absolute_floor, further=more)
            found.append(one)
        except AssertionError as error:
            failures.append(str(error))
    return found, failures
