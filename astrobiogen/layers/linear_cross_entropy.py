"""Output projection and cross-entropy in one module that never holds the [tokens, vocabulary] logits."""

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int


class LinearCrossEntropy(nn.Module):
    """Cross-entropy of `x @ weight.T` against `target`, computed in pieces of the vocabulary.

    Replaces `torch.nn.Linear(hidden_size, vocab_size, bias=False)` followed by `torch.nn.CrossEntropyLoss`; one
    parameter, `weight` [V, H], under the name it has in the Linear. With `bias=True` a second, `bias` [V]: it enters as
    one more column of the weight, whose input is one, at the price of a copy of `x` and `weight`.

    Args:
        hidden_size: H.
        vocab_size: V.
        ignore_index: targets with this value do not count.
        reduction: "mean" over counted targets, "sum" or "none".
        label_smoothing: share of the target's probability that is spread over the vocabulary, in [0, 1].
        z_loss: weight of the squared log-sum-exp that is added per token, >= 0.
        softcap: logits become softcap * tanh(logits / softcap); None for none.
        bias: add a bias per class.

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
        bias: bool = False,
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
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(H), as `torch.nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: torch.Tensor, target: torch.Tensor, num_tokens: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of `x` [..., H] against `target` [...] int64; `num_tokens` replaces the count in the mean, so that the
        micro-batches of one accumulation window weigh by tokens."""
        weight = self.weight
        if self.bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
            weight = torch.cat([weight, self.bias[:, None]], dim=1)
        return ops.linear_cross_entropy(
            x,
            weight,
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
        logits = F.linear(x, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults, for `print(module)`."""
        told = [str(self.weight.shape[1]), str(self.weight.shape[0])]
        defaults = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}
        told += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(told + (["bias=True"] if self.bias is not None else []))
