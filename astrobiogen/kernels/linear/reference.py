"""Linear layer in plain PyTorch: the definition that the kernel is held to.

y = x Wᵀ + b;  with g the gradient of y, over all rows:  dx = g W,  dW = gᵀ x,  db = Σ g.
"""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y [..., N] of x [..., K], weight [N, K] and bias [N]."""
    return F.linear(x, weight, bias)


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dW); an empty tensor for one that is not needed."""
    return (
        grad @ weight if need_x else x.new_empty(0),
        grad.flatten(0, -2).t() @ x.flatten(0, -2) if need_weight else weight.new_empty(0),
    )
