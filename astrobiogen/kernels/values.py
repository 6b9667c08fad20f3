"""Whether the values of a tensor can be looked at."""

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are values of `tensor` to look at: not on the meta device, nor inside a vmap, nor while PyTorch
    traces or compiles, where reading one would break the graph."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return False
    return not is_batched(tensor)


def is_batched(tensor: torch.Tensor) -> bool:
    """True for a tensor inside `torch.func.vmap`, or inside the vmap of ``torch.autograd.grad(is_grads_batched=True)``:
    it stands for several, so that `.item()` and checks of its values are errors."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
