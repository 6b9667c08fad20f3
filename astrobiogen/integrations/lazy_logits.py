"""Logits that are multiplied out only when something asks for their values."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import maybe_current_level
from torch.utils import _pytree as pytree

from astrobiogen.kernels import autocast
from astrobiogen.layers.children import PLAIN_TENSORS

# What can be told without values.
_METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_meta", "layout")]
    + [torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point]
)


class LazyLogits(torch.Tensor):
    """hidden W^T of shape [..., V], held as `hidden` [..., H] and `weight` [V, H].

    A fused loss reads the two; any other function sees the product, which is computed once, with its gradients.

    Args:
        hidden: [..., H].
        weight: [V, H].
        product: dtype that the product is computed in.
        dtype: of the logits; by default `product`.

    Raises:
        RuntimeError: from the first use of the values, if `hidden` or `weight` has changed since.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    product: torch.dtype
    _versions: tuple[int, int]
    _value: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, hidden: torch.Tensor, weight: torch.Tensor, product: torch.dtype, dtype: torch.dtype | None = None
    ) -> "LazyLogits":
        shape = (*hidden.shape[:-1], weight.shape[0])
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype or product, device=hidden.device)
        versions = _version(hidden), _version(weight)
        made.__dict__.update(hidden=hidden, weight=weight, product=product, _versions=versions, _value=None)
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def value(self) -> torch.Tensor:
        """The logits as an ordinary tensor."""
        held: dict[str, Any] = vars(self)
        if held["_value"] is None:
            hidden, weight, product = held["hidden"], held["weight"], held["product"]
            if (_version(hidden), _version(weight)) != held["_versions"]:
                raise RuntimeError(
                    "the logits were first asked for after the weight of the output layer had changed: read them "
                    "before the optimizer's step, or swap with swap_layers(model, exclude=['loss'])"
                )
            with torch.autocast(hidden.device.type, enabled=False):
                held["_value"] = F.linear(hidden.to(product), weight.to(product)).to(self.dtype)
        return held["_value"]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.float and args[0].__dict__["_value"] is None:  # what mixed-precision wrappers do
            held = args[0].__dict__
            return cls(held["hidden"], held["weight"], held["product"], torch.float32)
        args, options = pytree.tree_map_only(cls, cls.value, (args, dict(kwargs or {})))
        return func(*args, **options)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, options = pytree.tree_map_only(cls, cls.value, (args, dict(kwargs or {})))
        return func(*args, **options)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class LazyHead(nn.Linear):
    """An output projection without a bias whose logits are `LazyLogits`.

    Values are computed at once for one position (generation), while a model is traced or compiled, and for a weight
    that is no plain tensor (sharded, quantised).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        """The logits [..., V] of `input` [..., H]."""
        weight = self.weight
        if input.dim() < 2 or input.shape[-2] < 2 or type(weight) not in PLAIN_TENSORS or _traced():
            return F.linear(input, weight, self.bias)
        return LazyLogits(input, weight, autocast.product_dtype(input))


def _traced() -> bool:
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or maybe_current_level() is not None  # vmap, grad, jvp
    )
