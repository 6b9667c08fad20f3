"""Argument checks shared by the ops' public functions; every message names the argument, what was got and what is
expected."""

import importlib
import numbers
import operator
from typing import Any, SupportsIndex

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# Kernels on a GPU count in int32, and so do some of PyTorch's on the CPU: what is added to an index stays below.
INT32_SAFE = 2**30


def check_tensor(name: str, value: object) -> torch.Tensor:
    """`value` if it is a tensor, else TypeError."""
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {kind.__name__}")
        if is_distributed(value):
            _load_sharding_rules()
    return value  # pyright: ignore[reportReturnType]


def is_distributed(tensor: torch.Tensor) -> bool:
    """True for a `torch.distributed.tensor.DTensor`, asked without the import, which takes longer than ours."""
    return type(tensor).__name__ == "DTensor"


def _load_sharding_rules() -> None:
    importlib.import_module("astrobiogen.kernels.sharding")  # registers them, once


_load_sharding_rules._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess] (run while tracing)


def check_float(name: str, value: object) -> torch.Tensor:
    """`value` if it is a floating-point tensor of a supported dtype, else TypeError."""
    tensor: Any = value if type(value) is torch.Tensor else check_tensor(name, value)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a real number, of Python or numpy; bools are none."""
    if type(value) is float:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_int(name: str, value: Any, lowest: int = INT64_MIN, highest: int = INT64_MAX) -> int:
    """`value` as an int: an int, a symbolic one, or whatever else says by `__index__` that it is an integer (numpy's).

    Raises:
        TypeError: it is something else, or a bool.
        ValueError: it is not in [lowest, highest].
    """
    number: Any = value if type(value) is int or isinstance(value, torch.SymInt) else _index(name, value)
    if number < lowest or number > highest:
        bound = f">= {lowest}" if number < lowest and lowest > INT64_MIN else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name} must be an integer {bound}, got {value!r}")
    return number


def check_ints(name: str, value: Any, axes: int, lowest: int = INT64_MIN) -> tuple[int, ...]:
    """`value` as one int for each of `axes` spatial axes: an integer for all of them, or a sequence of them.

    Raises:
        TypeError, ValueError: as `check_int`, naming the axis; or the sequence has another length.
    """
    if type(value) is tuple and len(value) == axes:  # a layer's, checked when it was made: no names are put together
        for number in value:
            if type(number) is not int or not lowest <= number <= INT64_MAX:
                break
        else:
            return value
    elif type(value) is int or (hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0):  # arrays have it too
        return (check_int(name, value, lowest),) * axes
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}")
    values = tuple(value)
    if len(values) != axes:
        raise ValueError(f"{name} must be one integer or one per spatial axis ({axes}), got {value!r}")
    return tuple(check_int(f"{name} on spatial axis {axis}", number, lowest) for axis, number in enumerate(values))


def _index(name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = True
    if isinstance(value, bool) or number is True or number is False:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return number


def check_same_device(**tensors: torch.Tensor) -> None:
    """ValueError unless all tensors are on the device of the first."""
    first_name, device = "", None
    for name, tensor in tensors.items():
        if device is None:
            first_name, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first_name}, {device}, got {tensor.device}")


def check_same_dtype(**tensors: torch.Tensor) -> None:
    """TypeError unless all tensors have the dtype of the first."""
    first_name, dtype = "", None
    for name, tensor in tensors.items():
        if dtype is None:
            first_name, dtype = name, tensor.dtype
        elif tensor.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {dtype}, got {tensor.dtype}")


def check_alike(first_name: str, first: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """`check_same_dtype` and `check_same_device` of two tensors."""
    if tensor.dtype != first.dtype:
        check_same_dtype(**{first_name: first, name: tensor})
    if tensor.device != first.device:
        check_same_device(**{first_name: first, name: tensor})


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `tensor` has shape `expected`; `meaning` says where that shape comes from, e.g. "[H], H the
    last axis of x"."""
    if tensor.shape != expected and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({meaning}), got {tuple(tensor.shape)}")
