"""Tensors whose values cannot be read because a transform has put them side by side."""

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]


def is_batched(tensor: torch.Tensor) -> bool:
    """True for a tensor inside `torch.func.vmap`, or inside the vmap of ``torch.autograd.grad(is_grads_batched=True)``:
    it stands for several, so that `.item()` and checks of its values are errors."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
