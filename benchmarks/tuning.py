"""Gives a named constant of an op another value for one run, so that a sweep needs no edited files."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest


def set_constant(setting: str) -> None:
    """Apply one ``--set OP.NAME=VALUE`` or ``--set OP.MODULE.NAME.KEY...=VALUE``; refuses a constant that does not
    exist, so that no sweep times the same thing twice.
    """
    target, _, text = setting.partition("=")
    module, path = home_of(target)
    name, *steps = path or [""]
    try:
        values = [int(part) for part in text.split(",")]
        changed = replaced(getattr(module, name), steps, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise pytest.UsageError(f"--set {setting}: {module.__name__} has no such constant ({error!r})") from error
    setattr(module, name, changed)


def home_of(target: str) -> tuple[ModuleType, list[str]]:
    """The module that OP.MODULE... names (`triton_kernels` if it names none), and what follows it."""
    op, *path = target.split(".")
    package = importlib.import_module(f"astrobiogen.kernels.{op}")
    module = package
    while len(path) > 1 and hasattr(module, "__path__"):
        inner = f"{module.__name__}.{path[0]}"
        if importlib.util.find_spec(inner) is None:
            break
        module = importlib.import_module(inner)
        path.pop(0)
    if module is package:
        module = importlib.import_module(f"{package.__name__}.triton_kernels")
    return module, path


def replaced(value: Any, steps: Sequence[str], new: Sequence[int]) -> Any:
    """`value` with what lies at `steps` set to `new`: keys of a dict, first elements of the pairs of a tuple, fields of
    a dataclass. An integer takes one number, a dataclass its first fields.

    Raises:
        KeyError, AttributeError, TypeError: nothing lies there, or it is of another kind.
    """
    if steps:
        step, *rest = steps
        if isinstance(value, dict):
            key = next((key for key in value if str(key) == step), step)
            return {**value, key: replaced(value[key], rest, new)}
        if isinstance(value, tuple):
            if step not in {str(key) for key, _ in value}:
                raise KeyError(step)
            return tuple((key, replaced(one, rest, new) if str(key) == step else one) for key, one in value)
        return dataclasses.replace(value, **{step: replaced(getattr(value, step), rest, new)})
    if isinstance(value, int):
        (number,) = new
        return number
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **dict(zip(names, new, strict=False)))
