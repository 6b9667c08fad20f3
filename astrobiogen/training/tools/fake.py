"""Tensors with a shape and no memory, for passes that only count."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class Shapes:
    """Turns real tensors into ones that have shape, dtype and device only.

    Attributes:
        mode: the context in which operations on them make further ones. Real tensors, such as a model's weights, are
            taken as ones without memory there.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def of(self, value: Any) -> Any:
        """`value` with every tensor turned, in dictionaries, lists, tuples and graphs too."""
        if isinstance(value, FakeTensor):
            return value
        if isinstance(value, torch.Tensor):
            return self.mode.from_tensor(value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of(item) for item in value)
        return value.clone().apply(self.of) if hasattr(value, "edge_index") else value

    def of_model(self, model: nn.Module, stored: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The parameters and buffers of `model`, which may be on the device meta, by name; tied ones are one. With
        `stored` floating-point parameters are of that type.
        """
        made: dict[torch.Tensor, torch.Tensor] = {}

        def turned(value: torch.Tensor) -> torch.Tensor:
            if value not in made:
                trained = isinstance(value, nn.Parameter)
                dtype = stored if stored is not None and trained and value.is_floating_point() else value.dtype
                with self.mode:
                    device = "cpu" if value.is_meta else value.device
                    one = torch.empty_like(value, device=device, dtype=dtype)
                made[value] = one.detach().requires_grad_(value.requires_grad)
            return made[value]

        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return {name: turned(value) for name, value in named}


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside `value`: dictionaries, lists, tuples, graphs."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "edge_index"):
        value = value.to_dict()
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in tensors(item)] if isinstance(value, list | tuple) else []
