"""Integer arguments of the layers' constructors: Python's and NumPy's alike, as PyTorch's own layers take them."""

import operator
from collections.abc import Iterable
from typing import SupportsIndex


def as_integer(name: str, value: SupportsIndex, lowest: int) -> int:
    """`value` as an `int`.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below `lowest`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = operator.index(value)
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {number}")
    return number


def per_axis(name: str, value: SupportsIndex | Iterable[SupportsIndex], n_axes: int, lowest: int) -> tuple[int, ...]:
    """`value`, one integer or one per axis, as `n_axes` of them.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: there are not `n_axes` of them, or one is below `lowest`.
    """
    values = tuple(value) if isinstance(value, Iterable) else (value,) * n_axes
    if len(values) != n_axes:
        raise ValueError(f"{name} must be an integer or {n_axes} of them, got {value!r}")
    return tuple(as_integer(name, number, lowest) for number in values)
