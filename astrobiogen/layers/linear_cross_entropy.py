"""Output projection and cross-entropy in one module that never holds the [tokens, vocabulary] logits."""

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of `x @ weight.T` against `target`, computed in pieces of the vocabulary.

    Replaces `torch.nn.Linear(hidden_size, vocab_size, bias=False)` followed by `torch.nn.CrossEntropyLoss`; one
    parameter, `weight` [V, H], under the name it has in the Linear.

    Args:
        hidden_size: H.
        vocab_size: V.
        ignore_index: targets with this value do not count.
        reduction: "mean" over counted targets, "sum" or "none".
        label_smoothing: share of the target's probability that is spread over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-sum-exp that is added per token, >= 0.
        softcap: logits become softcap * tanh(logits / softcap); None for none.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive; from `forward`, as `ops.linear_cross_entropy`.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = check_int("vocab_size", vocab_size, 1), check_int("hidden_size", hidden_size, 1)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H), as `torch.nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(
        self, x: torch.Tensor, target: torch.Tensor, num_tokens: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of `x` [..., H] against `target` [...] int64; `num_tokens` replaces the count in the mean, so that the
        micro-batches of one accumulation window weigh by tokens."""
        return ops.linear_cross_entropy(
            x,
            self.weight,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            num_tokens=num_tokens,
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The full logits [..., V], for generation; soft-capped where the loss is."""
        logits = x @ self.weight.t()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, ignore_index={self.ignore_index}"
