"""Nested Python state as JSON plus named tensors: what a checkpoint holds instead of a pickle."""

from typing import Any

import torch

TENSOR, _TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str = "state") -> Any:
    """`value` as JSON data; tensors inside it are put into `tensors` under dotted names.

    Dictionaries (with keys of any packable kind), lists, tuples, strings, numbers, booleans, None and tensors keep
    their exact type.

    Raises:
        TypeError: any other type, with the place where it was found.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
        return {
            ITEMS: [
                [pack(key, tensors, f"{name}.key"), pack(item, tensors, f"{name}.{key}")] for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{name}: got {type(value).__name__}, expected a dictionary, list, tuple, string, number, None or tensor"
    )


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if ITEMS in value:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value[ITEMS]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def unshare(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split off tensors that are the very same memory (tied weights, shared tables), which safetensors refuses to store
    twice.

    Returns:
        the tensors to store, contiguous and on the CPU, and for each name left out the stored name that it equals.
    """
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        cpu = tensor.detach().cpu().contiguous()
        # A view into larger memory (or a partial overlap) would drag that memory along: store a copy of its own.
        whole = cpu.untyped_storage().nbytes() == cpu.numel() * cpu.element_size()
        stored[name] = cpu if whole else cpu.clone()
    return stored, aliases


def share(stored: dict[str, torch.Tensor], aliases: dict[str, str]) -> dict[str, torch.Tensor]:
    """The inverse of `unshare`."""
    return stored | {name: stored[target] for name, target in aliases.items()}
