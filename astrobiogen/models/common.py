"""What the models share: schedules over updates, configuration overrides, shape checks that name the axis,
checkpointing, masked means."""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from astrobiogen.kernels.values import has_values
from astrobiogen.layers.children import globally_hooked, is_plain
from astrobiogen.layers.linear import LINEAR

Config = TypeVar("Config")


class CountsUpdates(abc.ABC):
    """A module with a schedule over optimizer updates. Whoever trains calls `after_update` once behind each update that
    was taken, however many forward calls its micro-batches made."""

    @abc.abstractmethod
    def after_update(self) -> None:
        """Count one update."""


class HoldsConstants(nn.Module):
    """A module with fixed tables that its constructor computes. They are buffers without an entry in the state dict:
    they follow the module's device, are never less than fp32, and are whole again after `to_empty`."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, torch.Tensor] = {}

    def hold(self, name: str, value: torch.Tensor) -> None:
        """Register `value`, computed on the CPU, as the buffer `name`."""
        value = value.to(torch.float32).contiguous()
        self._constants[name] = value
        self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """The tables by name, fp32 on the CPU, wherever the module is."""
        return dict(self._constants)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Every move of the module passes here."""
        super()._apply(fn, recurse)
        for name, value in self._constants.items():
            buffer = self._buffers[name]
            if buffer is not None and has_values(buffer):
                self._buffers[name] = value.to(buffer.device, torch.promote_types(buffer.dtype, torch.float32))
        return self


def resolve_config(cls: type[Config], config: Config | None, overrides: dict[str, Any]) -> Config:
    """`config` (default `cls()`) with the fields in `overrides` replaced.

    Raises:
        TypeError: `config` is of another class or a name in `overrides` is not a field of `cls`.
    """
    if config is None:
        return cls(**overrides)
    if not isinstance(config, cls):
        raise TypeError(f"config must be a {cls.__name__}, got {type(config).__name__}")
    return dataclasses.replace(config, **overrides)  # pyright: ignore[reportArgumentType, reportReturnType]


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_axes(name: str, tensor: torch.Tensor, axes: Sequence[str], sizes: dict[str, int] | None = None) -> None:
    """ValueError naming the first axis of `tensor` that does not fit.

    Args:
        name: the argument's name in the message.
        tensor: what was given.
        axes: name of every axis, in order.
        sizes: the axes whose size is fixed.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(axes):
        raise ValueError(f"{name} must have {len(axes)} axes [{', '.join(axes)}], got {len(shape)} with shape {shape}")
    for axis, size in zip(axes, shape):
        expected = (sizes or {}).get(axis, size)
        if size != expected:
            raise ValueError(f"{name}: axis {axis!r} has size {size}, expected {expected} (shape {shape})")


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for the device of `tensor`; the meta device has none."""
    kind = tensor.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def affine(layer: nn.Module, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, `width`] and bias [N] of a linear layer: its own, or, where it is more than its class (an adapter, a
    hook, a parametrisation), what it makes of the zero vector and of the unit vectors, in the dtype of `like`."""
    if is_plain(layer, LINEAR) and not globally_hooked():
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight is not None and bias is not None:
            return weight, bias
    units = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # the last row is zero
    images = layer(units)
    return (images[:-1] - images[-1]).t(), images[-1]


def maybe_checkpoint(enabled: bool, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`; with `enabled` and gradients on, its activations are computed again in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32; fp32 and fp64 as they are. For softmaxes, sums and losses."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: int) -> torch.Tensor:
    """Mean of `values` over `axis` where `mask` (same leading axes up to `axis`) is true; 0 where nothing is."""
    weights = mask.to(values.dtype)
    while weights.dim() < values.dim():
        weights = weights[..., None]
    return (values * weights).sum(axis) / weights.sum(axis).clamp(min=1.0)


def trainable_parameters(module: torch.nn.Module) -> int:
    """Number of trainable scalars, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
