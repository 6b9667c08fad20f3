"""Argument checks shared by the ops' public functions; every message names the argument, what was got and what is
expected."""

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> torch.Tensor:
    """`value` if it is a tensor, else TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_float(name: str, value: object) -> torch.Tensor:
    """`value` if it is a floating-point tensor of a supported dtype, else TypeError."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    return tensor


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_same_device(**tensors: torch.Tensor) -> None:
    """ValueError unless all tensors are on the device of the first."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_same_dtype(**tensors: torch.Tensor) -> None:
    """TypeError unless all tensors have the dtype of the first."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """ValueError unless `tensor` has shape `expected`; `meaning` says where that shape comes from, e.g. "[H], H the
    last axis of x"."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({meaning}), got {tuple(tensor.shape)}")
