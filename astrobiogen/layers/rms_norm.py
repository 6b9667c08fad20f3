"""RMSNorm as a module, alone or with the residual addition in front of it."""

from typing import overload

import torch
from torch import nn

from astrobiogen import ops


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis; statistics in fp32 (fp64 for fp64 input).

    Replaces `torch.nn.RMSNorm(hidden_size)` and the RMSNorm of Hugging Face Llama, Mistral and Qwen: one parameter,
    `weight` [H].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        hidden_size: H, length of the last axis.
        eps: added to the mean square, > 0.

    Raises:
        ValueError: `hidden_size` or `eps` is not positive; from `forward`, the shapes do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `x` [..., H]; with `residual` [..., H] return (norm(x + residual), x + residual) from one pass."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        common = torch.promote_types(x.dtype, residual.dtype)  # under autocast the branch is half, the stream fp32
        return ops.add_rms_norm(x.to(common), residual.to(common), self.weight, self.eps)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"{self.hidden_size}, eps={self.eps}"
