"""RMSNorm as a module, alone or with the residual addition in front of it."""

from typing import overload

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int


def epsilon(dtype: torch.dtype) -> float:
    """Machine epsilon of the statistics of a norm over input of `dtype`: that of fp64 for fp64, else of fp32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last axis; statistics in fp32 (fp64 for fp64 input).

    Replaces `torch.nn.RMSNorm(hidden_size)` and the RMSNorm of Hugging Face Llama, Mistral and Qwen: one parameter,
    `weight` [H].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    Args:
        hidden_size: H, length of the last axis.
        eps: added to the mean square, > 0; None takes the machine epsilon of the statistics (1.2e-7; 2.2e-16 for fp64
            input), as `torch.nn.RMSNorm(eps=None)` does.

    Raises:
        TypeError: `hidden_size` is not an integer.
        ValueError: `hidden_size` or `eps` is not positive; from `forward`, the shapes do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if eps is not None and not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.hidden_size = check_int("hidden_size", hidden_size, 1)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(self.hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `x` [..., H]; with `residual` [..., H] return (norm(x + residual), x + residual) from one pass."""
        eps = self.eps
        if residual is None:
            return ops.rms_norm(x, self.weight, epsilon(x.dtype) if eps is None else eps)
        common = torch.promote_types(x.dtype, residual.dtype)  # under autocast the branch is half, the stream fp32
        eps = epsilon(common) if eps is None else eps
        return ops.add_rms_norm(x.to(common), residual.to(common), self.weight, eps)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"{self.hidden_size}, eps={self.eps}"
