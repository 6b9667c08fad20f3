"""Mixed precision: what `torch.autocast` does to the PyTorch functions that our ops replace, done to our ops.

Autocast works by a list of PyTorch's own functions, per device; an op of a library is on none
(`torch.library.register_autocast` would fix one dtype for good). Every public function therefore asks this module, and
gets the policy of what it replaces:

* `lower_precision`: convolutions, matrix products and attention take their operands in autocast's dtype;
* `full_precision`: norms take theirs in float32, on every device but the CPU, where PyTorch leaves them alone;
* `widest`: pointwise functions of several tensors take the widest of their dtypes, as type promotion does.

float64 stays what it is under all three. A cast is differentiable, so a gradient arrives in the dtype of its leaf.

Inside an op autocast is off (csrc/autocast.cpp, and `reference` here), as inside PyTorch's own: it would round fp32
sums.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.checks import check_same_dtype

# Whether it is on for any device: the usual answer is no, and a small call has no time for more.
anywhere = torch._C._is_any_autocast_enabled


def enabled(tensor: torch.Tensor) -> bool:
    """True where autocast is on for the device of `tensor`."""
    if not torch._C._is_any_autocast_enabled():  # a third of the price, and the usual case
        return False
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def lower_precision(*tensors: Any) -> tuple[Any, ...]:
    """The floating-point tensors in autocast's dtype, where it is on for the device of the first one.

    What is no tensor (None, a wrong argument) comes back as it is, for the checks behind.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(tensors[0], torch.Tensor) or not enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if _eligible(t) else t for t in tensors)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a matrix product of `x` has: autocast's where it is on for its device, else its own."""
    return torch.get_autocast_dtype(x.device.type) if _eligible(x) and enabled(x) else x.dtype


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 where autocast runs norms in it: on every device but the CPU."""
    return x if x.is_cpu or not _eligible(x) or not enabled(x) else x.to(torch.float32)


def widest(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the widest of their dtypes under autocast; elsewhere TypeError unless they share one."""
    values = tuple(tensors.values())
    if not enabled(values[0]):
        check_same_dtype(**tensors)
    common = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return tuple(value.to(common) for value in values)


def constants(x: torch.Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Tables that `x` is multiplied by, under autocast in float32 (float64 for float64 `x`), unless they share its
    dtype."""
    if (
        not enabled(x)
        or any(not isinstance(t, torch.Tensor) for t in tensors)
        or all(t.dtype == x.dtype for t in tensors)
    ):
        return tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(t.to(wide) for t in tensors)


def reference(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` with autocast off, as inside an op: for plain references."""
    first = next((value for value in arguments if isinstance(value, torch.Tensor)), None)
    if first is None or not enabled(first):
        return function(*arguments)
    with torch.autocast(first.device.type, enabled=False):
        return function(*arguments)


def _eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
