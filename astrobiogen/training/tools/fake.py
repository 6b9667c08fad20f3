"""Tensors with a shape and no memory, for passes that only count."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


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
        if isinstance(value, torch.Tensor):
            return self.mode.from_tensor(value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of(item) for item in value)
        return value.clone().apply(self.of) if hasattr(value, "edge_index") else value
