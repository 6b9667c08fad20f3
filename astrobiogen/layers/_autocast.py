"""Mixed precision for the custom ops, which `torch.autocast` does not know."""

from typing import Any

import torch


def autocast_tensors(*tensors: torch.Tensor | None) -> Any:
    """The tensors in autocast's dtype where autocast is on for their device, as PyTorch does for its own matrix
    products.

    fp64 tensors stay as they are, as under PyTorch's own rule.
    """
    first = next(tensor for tensor in tensors if tensor is not None)
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
