"""Output projection and cross-entropy in one module that never holds the [tokens, vocabulary] logits."""

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.layers._autocast import autocast_tensors


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of `x @ weight.T` against `target`, computed in pieces of the vocabulary.

    Replaces `torch.nn.Linear(hidden_size, vocab_size, bias=False)` followed by `torch.nn.CrossEntropyLoss`; one
    parameter, `weight` [V, H], under the name it has in the Linear.

    Args:
        hidden_size: H.
        vocab_size: V.
        ignore_index: targets with this value do not count.
        reduction: "mean" over counted targets, "sum" or "none".

    Raises:
        ValueError: a size is not positive; from `forward`, as `ops.linear_cross_entropy`.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or vocab_size < 1:
            raise ValueError(f"hidden_size and vocab_size must be at least 1, got {hidden_size} and {vocab_size}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of `x` [..., H] against `target` [...] int64."""
        x, weight = autocast_tensors(x, self.weight)
        return ops.linear_cross_entropy(x, weight, target, ignore_index=self.ignore_index, reduction=self.reduction)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The full logits [..., V], for generation."""
        return x @ self.weight.t()

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, ignore_index={self.ignore_index}"
