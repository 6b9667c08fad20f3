"""The formulas that the library's layers compute, and which of them a module of somebody else's is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from astrobiogen.integrations.expressions import (
    INPUT,
    Expression,
    UnclearError,
    call,
    expression_of,
    number,
)


@dataclasses.dataclass(frozen=True)
class Norm:
    """y = x / sqrt(mean(x²) + eps) · (offset + weight), statistics in fp32.

    Attributes:
        eps: added to the mean square.
        offset: 0 or 1.
        input_dtype: y has the dtype of x; otherwise the one that x and weight together promote to.
    """

    eps: float
    offset: float
    input_dtype: bool


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """y = down(silu(gate(x)) · up(x)), by the names of the children.

    Attributes:
        gate, up, down: the projections; where one projection makes gate and up, one after the other, its name is in
            both.
        activation: name of the child that is to be SiLU, or "" where the function is called.
    """

    gate: str
    up: str
    down: str
    activation: str

    @property
    def packed(self) -> bool:
        """Whether gate and up come from one projection."""
        return self.gate == self.up


def norm_of(module: nn.Module) -> Norm | str:
    """The norm that `module` is, or why it is none of those known."""
    try:
        found = expression_of(module)
    except UnclearError as error:
        return f"its forward is none of the known formulas ({error})"
    for formula, expected in _norms(sorted(_constants(found, float))):
        if found == expected:
            return formula
    return "its forward is none of the known formulas"


def _norms(numbers: list[float]) -> Iterator[tuple[Norm, Expression]]:
    weight, half = ("tensor", "weight"), ("dtype", INPUT)
    x = call("float", INPUT)
    full_weight = call("float", weight)
    for eps in numbers:
        mean = call("mean", call("pow", x, number(2)), number(-1), keepdim=number(True))
        core = call("mul", x, call("rsqrt", call("add", mean, number(eps))))
        yield Norm(eps, 0.0, False), call("mul", call("to", core, half), weight)
        yield Norm(eps, 0.0, True), call("to", call("mul", core, weight), half)
        yield Norm(eps, 0.0, True), call("to", call("mul", core, full_weight), half)
        for one in (1.0, 1):
            yield Norm(eps, 1.0, True), call("to", call("mul", core, call("add", number(one), full_weight)), half)
            shifted = call("float", call("add", number(one), weight))
            yield Norm(eps, 1.0, True), call("to", call("mul", core, shifted), half)


def mlp_of(module: nn.Module) -> GatedMLP | str:
    """The gated MLP that `module` is, or why it is none of those known."""
    try:
        found = expression_of(module)
    except UnclearError as error:
        return f"its forward is none of the known formulas ({error})"
    names = [name for name, _ in module.named_children()]
    if found[0] == "apply" and found[2][0] == "mul" and len(found[2]) == 3:
        for gate, up in (found[2][1:], found[2][:0:-1]):
            mlp = _gated(found[1], gate, up)
            if mlp is not None and {mlp.gate, mlp.up, mlp.down} <= set(names):
                return mlp
    return "its forward is none of the known formulas"


def _gated(down: str, gate: Expression, up: Expression) -> GatedMLP | None:
    if gate[0] == "silu":
        activation, inner = "", gate[1]
    elif gate[0] == "apply":
        activation, inner = gate[1], gate[2]
    else:
        return None
    if inner[0] == "apply" and inner[2] == INPUT and up[0] == "apply" and up[2] == INPUT:
        return GatedMLP(inner[1], up[1], down, activation)
    halves = [("item", both, number(place)) for both in _packed(inner) for place in (0, 1)]
    if [inner, up] == halves:
        return GatedMLP(inner[1][1][1], inner[1][1][1], down, activation)
    return None


def _packed(inner: Expression) -> Iterator[Expression]:
    """The two halves of one projection of the input that `inner` is an item of."""
    if inner[0] == "item" and inner[1][0] == "chunk":
        _, projected, count, axis = inner[1]
        if projected[0] == "apply" and projected[2] == INPUT and (count, axis) == (number(2), number(-1)):
            yield inner[1]


def _constants(expression: Expression, kind: type) -> set[float]:
    found: set[float] = set()
    if expression[0] == "constant":
        return {expression[1]} if type(expression[1]) is kind else found
    for part in expression[1:]:
        if isinstance(part, tuple):
            found |= _constants(part, kind)
    return found
