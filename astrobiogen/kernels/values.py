"""What may be asked of a tensor: its values, whether it needs a gradient; checks of values that wait for no device."""

from collections.abc import Callable

import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor

WITHOUT_VALUES = ("meta",)  # device types
# None outside the transforms of `torch.func`, inside which a tensor may stand for several and has no memory layout.
transform_level = _functorch.maybe_current_level


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are values of `tensor` to look at: not on the meta device, nor inside a vmap, nor while PyTorch
    traces or compiles, where reading one would break the graph."""
    if torch.compiler.is_compiling() or tensor.device.type in WITHOUT_VALUES or isinstance(tensor, FakeTensor):
        return False
    return not is_batched(tensor)


def require_values(valid: torch.Tensor, message: str) -> None:
    """ValueError with `message` unless all of `valid` (bool) are true. On a GPU the device stops with it, later: asking
    would wait for all that is queued there. Nothing is checked where there are no values."""
    if not has_values(valid):
        return
    if valid.device.type != "cpu":
        torch._assert_async(valid.all(), message)
    elif not bool(valid.all()):
        raise ValueError(message)


def require_range(index: torch.Tensor, count: int, message: Callable[[str], str]) -> None:
    """`require_values` for integers that must lie in [0, count); `message` is told what was found."""
    if index.numel() == 0 or not has_values(index):
        return
    if index.device.type != "cpu":
        require_values((index >= 0) & (index < count), message("at least one that is outside"))
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= count:
        raise ValueError(message(f"values from {low} to {high}"))


def is_batched(tensor: torch.Tensor) -> bool:
    """True for a tensor inside `torch.func.vmap`, or inside the vmap of ``torch.autograd.grad(is_grads_batched=True)``:
    it stands for several, so that `.item()` and checks of its values are errors."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """True where autograd will ask for the gradient of one of `tensors`."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
