"""RMSNorm as a module, alone or with the residual addition in front of it."""

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int, check_ints


def epsilon(dtype: torch.dtype) -> float:
    """Machine epsilon of the statistics of a norm over input of `dtype`: that of fp64 for fp64, else of fp32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis, or the last few; statistics in fp32 (fp64 for fp64
    input).

    Replaces `torch.nn.RMSNorm(normalized_shape, eps, elementwise_affine)`, whose arguments it takes in the same order,
    and the RMSNorm of Hugging Face Llama, Mistral and Qwen, whose `eps` is the default here: one parameter, `weight`
    [*normalized_shape].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        normalized_shape: H, length of the last axis, or the lengths of the last axes.
        eps: added to the mean square, > 0; None takes the machine epsilon of the statistics (1.2e-7; 2.2e-16 for fp64
            input), as `torch.nn.RMSNorm(eps=None)` does.
        elementwise_affine: have a weight.

    Raises:
        TypeError: `normalized_shape` is no integer and no sequence of integers.
        ValueError: `normalized_shape` or `eps` is not positive; from `forward`, the shapes do not fit.
    """

    weight: torch.Tensor  # None without `elementwise_affine`

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if eps is not None and not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        if isinstance(normalized_shape, Sequence):
            self.normalized_shape = check_ints("normalized_shape", normalized_shape, len(normalized_shape), 1)
        else:
            self.normalized_shape = (check_int("normalized_shape", normalized_shape, 1),)
        self.hidden_size = math.prod(self.normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `x` [..., H]; with `residual` [..., H] return (norm(x + residual), x + residual) from one pass."""
        weight = self.weight
        if weight is None:
            weight = x.new_ones(self.normalized_shape)
        if len(self.normalized_shape) != 1:
            return self._over_axes(x, residual, weight)
        return self._over_last(x, residual, weight)

    def _over_last(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        eps = self.eps
        if residual is None:
            return ops.rms_norm(x, weight, epsilon(x.dtype) if eps is None else eps)
        common = torch.promote_types(x.dtype, residual.dtype)  # under autocast the branch is half, the stream fp32
        eps = epsilon(common) if eps is None else eps
        return ops.add_rms_norm(x.to(common), residual.to(common), weight, eps)

    def _over_axes(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        first = -len(self.normalized_shape)
        if tuple(x.shape[first:]) != self.normalized_shape:
            raise ValueError(f"x: got the last axes {tuple(x.shape[first:])}, expected {self.normalized_shape}")
        rest = None if residual is None else residual.flatten(first)
        result = self._over_last(x.flatten(first), rest, weight.flatten())
        if isinstance(result, tuple):
            return result[0].view(x.shape), result[1].view(x.shape)
        return result.view(x.shape)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        shape = self.normalized_shape if len(self.normalized_shape) > 1 else self.hidden_size
        return f"{shape}, eps={self.eps}" + ("" if self.elementwise_affine else ", elementwise_affine=False")
