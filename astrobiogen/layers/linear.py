"""Linear layer over `astrobiogen.ops.linear`."""

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.layers.children import PLAIN_TENSORS


class Linear(nn.Linear):
    """`torch.nn.Linear` (same arguments, initialisation and state dict) with the library's CPU kernel for narrow fp32
    layers; see `ops.linear`.

    A weight that is no plain tensor (sharded, quantised) is multiplied as its own class does it.

    Raises:
        ValueError: from `forward`, the last axis of the input is not `in_features`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        """Map `input` [..., in_features] to [..., out_features]."""
        weight, bias = self.weight, self.bias
        if type(weight) in PLAIN_TENSORS:
            return ops.linear(input, weight, bias)
        return F.linear(input, weight, bias)


LINEAR = (nn.Linear, Linear)  # classes whose call is x W^T + b and nothing else
