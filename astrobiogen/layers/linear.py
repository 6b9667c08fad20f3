"""Linear layer over `astrobiogen.ops.linear`."""

import torch
from torch import nn

from astrobiogen import ops


class Linear(nn.Linear):
    """`torch.nn.Linear` (same arguments, initialisation and state dict) with the library's CPU kernel for narrow fp32
    layers; see `ops.linear`.

    Raises:
        ValueError: from `forward`, the last axis of the input is not `in_features`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        """Map `input` [..., in_features] to [..., out_features]."""
        return ops.linear(input, self.weight, self.bias)
