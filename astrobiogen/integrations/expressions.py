"""What the `forward` of a small module computes, as an expression.

The statements of a straight-line `forward` are carried out on symbols: names are replaced by what they stand for,
methods of the module are entered, flags of the module decide its branches. What is left does not depend on how the
author called things, in which order independent lines stand, or which of two spellings of one operation was chosen.
An expression is a nested tuple ``(operation, *operands)``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Expression = tuple[Any, ...]
INPUT: Expression = ("input",)
_FUNCTIONS = {torch.rsqrt: "rsqrt", torch.pow: "pow", torch.square: "square", torch.mean: "mean", F.silu: "silu"}
_METHODS = ("chunk", "float", "mean", "pow", "rsqrt", "square", "to", "type_as")
_DEEPEST = 3  # methods within methods


class UnclearError(Exception):
    """The `forward` is not a formula of the operations that are known here."""


def number(value: float | int | bool | None) -> Expression:
    """A constant."""
    return ("constant", value)


def constant(value: Any) -> Expression:
    """A constant of any kind: a dtype, a function, a module."""
    return ("constant", value)


def call(name: str, *given: Expression, **options: Expression) -> Expression:
    """The operands `given` under the operation `name`, in its one spelling.

    Raises:
        UnclearError: the operation has no spelling with these options.
    """
    operands = list(given)
    if name == "float":
        name, operands = "to", [*operands, constant(torch.float32)]
    elif name == "type_as":
        name, operands = "to", [operands[0], ("dtype", operands[1])]
    elif name == "square":
        name, operands = "pow", [*operands, number(2)]
    elif name == "mean":
        axis = operands[1] if len(operands) > 1 else options.pop("dim", None)
        if axis is None or options.pop("keepdim", None) != number(True):
            raise UnclearError("a mean of another shape")
        operands = [operands[0], axis]
    elif name == "chunk":
        axis = operands[2] if len(operands) > 2 else options.pop("dim", None)
        operands = [*operands[:2], axis if axis is not None else number(0)]
    if options:
        raise UnclearError(f"{name} with {sorted(options)[0]}")
    if name == "pow" and operands[1] == number(-0.5):
        name, operands = "rsqrt", operands[:1]
    if name in ("mul", "add"):
        parts = [part for one in operands for part in (one[1:] if one[0] == name else (one,))]
        return (name, *sorted(parts, key=repr))
    if name == "to" and operands[0][:1] == ("to",) and operands[0][2] == operands[1]:
        return operands[0]
    return (name, *operands)


def expression_of(module: nn.Module) -> Expression:
    """What `module.forward` computes of its one argument, ``INPUT``.

    Raises:
        UnclearError: the source is not there, or holds more than a formula: loops, conditions on data, other
            operations or functions, more than one argument.
    """
    return _Reader(module, type(module).forward, 0).result((INPUT,))


class _Reader(ast.NodeVisitor):
    """The value of one method's body."""

    def __init__(self, module: nn.Module, function: Any, depth: int) -> None:
        if depth > _DEEPEST or not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
            raise UnclearError("not a plain method")
        try:
            parsed = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError, TypeError) as error:
            raise UnclearError("its source is not there") from error
        if not isinstance(parsed, ast.FunctionDef):
            raise UnclearError("not a plain method")
        self.module, self.depth, self.globals = module, depth, function.__globals__
        self.body, self.arguments = parsed.body, parsed.args
        self.names: dict[str, Expression] = {}

    def result(self, values: tuple[Expression, ...]) -> Expression:
        """The returned expression for these arguments."""
        given, more = self.arguments.args, self.arguments
        if len(given) != len(values) + 1 or more.vararg or more.kwarg or more.kwonlyargs or more.posonlyargs:
            raise UnclearError("another number of arguments")
        self.own = given[0].arg
        self.names = {argument.arg: value for argument, value in zip(given[1:], values, strict=True)}
        returned = self._run(self.body)
        if returned is None:
            raise UnclearError("nothing is returned")
        return returned

    def _run(self, body: list[ast.stmt]) -> Expression | None:
        for statement in body:
            if isinstance(statement, ast.Return) and statement.value is not None:
                return self.visit(statement.value)
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._assign(statement.targets[0], self.visit(statement.value))
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self._assign(statement.target, self.visit(statement.value))
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                value = self._binary(statement.op, self.names[statement.target.id], self.visit(statement.value))
                self.names[statement.target.id] = value
            elif isinstance(statement, ast.If):
                returned = self._run(statement.body if self._holds(statement.test) else statement.orelse)
                if returned is not None:
                    return returned
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                raise UnclearError(f"a statement of another kind: {type(statement).__name__}")
        return None

    def _assign(self, target: ast.expr, value: Expression) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple) and value[0] == "chunk":
            for place, part in enumerate(target.elts):
                self._assign(part, ("item", value, number(place)))
        else:
            raise UnclearError("an assignment to something else than a name")

    def _holds(self, test: ast.expr) -> bool:
        """Whether a condition on the module's own settings holds."""
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Is | ast.IsNot):
            left, right = self.visit(test.left), self.visit(test.comparators[0])
            if right != number(None):
                raise UnclearError("a condition on data")
            present = left[0] != "constant" or left[1] is not None
            return present if isinstance(test.ops[0], ast.IsNot) else not present
        value = self.visit(test)
        if value[0] != "constant" or not isinstance(value[1], bool):
            raise UnclearError("a condition on data")
        return value[1]

    def generic_visit(self, node: ast.AST) -> Any:
        """Everything that has no method here."""
        raise UnclearError(f"an expression of another kind: {type(node).__name__}")

    def visit_Constant(self, node: ast.Constant) -> Expression:
        return constant(node.value)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Expression:
        value = self.visit(node.operand)
        if not isinstance(node.op, ast.USub) or value[0] != "constant":
            raise UnclearError("a sign")
        return number(-value[1])

    def visit_BinOp(self, node: ast.BinOp) -> Expression:
        return self._binary(node.op, self.visit(node.left), self.visit(node.right))

    def _binary(self, operator: ast.operator, left: Expression, right: Expression) -> Expression:
        names = {ast.Mult: "mul", ast.Add: "add", ast.Pow: "pow"}
        if type(operator) not in names:
            raise UnclearError(f"an operator {type(operator).__name__}")
        if right[0] == left[0] == "constant":
            raise UnclearError("arithmetic of constants")
        return call(names[type(operator)], left, right)

    def visit_Name(self, node: ast.Name) -> Expression:
        if node.id in self.names:
            return self.names[node.id]
        if node.id == self.own:
            return constant(self.module)
        if node.id in self.globals:
            return constant(self.globals[node.id])
        raise UnclearError(f"the name {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> Expression:
        value = self.visit(node.value)
        if value[0] != "constant":
            if node.attr != "dtype":
                raise UnclearError(f"the attribute {node.attr} of a tensor")
            return ("dtype", value)
        if value[1] is self.module:
            return self._member(node.attr)
        try:
            return constant(getattr(value[1], node.attr))
        except AttributeError as error:
            raise UnclearError(f"the attribute {node.attr}") from error

    def _member(self, name: str) -> Expression:
        held = getattr(self.module, name, None)
        if isinstance(held, nn.Module):
            return ("child", name)
        if isinstance(held, torch.Tensor):
            return ("tensor", name)
        if held is None or isinstance(held, bool | int | float):
            return number(held)
        if inspect.ismethod(held) and held.__self__ is self.module:
            return ("method", name)
        raise UnclearError(f"the attribute {name} of the module")

    def visit_Subscript(self, node: ast.Subscript) -> Expression:
        value, place = self.visit(node.value), self.visit(node.slice)
        if value[0] != "chunk" or place[0] != "constant":
            raise UnclearError("a slice")
        return ("item", value, place)

    def visit_Call(self, node: ast.Call) -> Expression:
        operands = tuple(self.visit(one) for one in node.args)
        if any(one.arg is None for one in node.keywords):
            raise UnclearError("unpacked arguments")
        options = {str(one.arg): self.visit(one.value) for one in node.keywords}
        if isinstance(node.func, ast.Attribute):
            receiver = self.visit(node.func.value)
            if receiver[0] != "constant":
                if node.func.attr not in _METHODS:
                    raise UnclearError(f"the method {node.func.attr}")
                return call(node.func.attr, receiver, *operands, **options)
        function = self.visit(node.func)
        if function[0] == "child" and len(operands) == 1 and not options:
            return ("apply", function[1], operands[0])
        if function[0] == "method" and not options:
            method: Callable[..., Any] = getattr(type(self.module), function[1], None)  # type: ignore[assignment]
            return _Reader(self.module, method, self.depth + 1).result(operands)
        if function[0] == "constant":
            for known, name in _FUNCTIONS.items():
                if function[1] is known:
                    return call(name, *operands, **options)
        raise UnclearError("a function of another kind")
