"""Linear layer followed by cross-entropy, in plain PyTorch: the definition that the kernels are held to.

z = softcap(x W^T),  lse = log sum_j exp z_j,  per token t with target y:

loss = lse - (1 - s) z_y - s mean_j z_j + zeta lse^2

(s: label smoothing, zeta: z_loss; the loss is 0 where y == ignore_index).

softcap(a) = c tanh(a / c), or a itself without a cap (c = 0 in the ops). The logits are rounded to the dtype of x, as
`F.linear` does; everything after them is fp32 (fp64 for fp64 input). The whole [tokens, vocabulary] matrix is held:
this is the definition, not the fast way.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from astrobiogen.kernels.values import is_batched


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *options: Any) -> torch.Tensor:
    """Loss per token, [tokens], from x [tokens, H], weight [V, H] and target [tokens]; differentiable any number of
    times. `options` as `linear_cross_entropy_forward`.
    """
    return linear_cross_entropy_forward(x, weight, target, *options)[0]


def linear_cross_entropy_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `linear_cross_entropy`: loss [tokens], fp32 (fp64 for fp64 input), and lse [tokens], fp64 (0 for an
    ignored token): of an lse of 1000 fp32 keeps 3e-5, too little for the probabilities exp(z - lse)."""
    check_targets(target, weight.shape[0], ignore_index)
    kept = target != ignore_index
    logits = only_kept(kept, _capped(_logits(only_kept(kept, x), weight), softcap))
    logprobs = torch.log_softmax(logits, dim=-1)
    common = logits.detach().amax(-1)
    common = torch.where(torch.isfinite(common), common, torch.zeros_like(common))
    lse = common.double() + torch.logsumexp(logits - common.unsqueeze(-1), dim=-1)
    loss = F.nll_loss(logprobs, target, ignore_index=ignore_index, reduction="none") * (1.0 - label_smoothing)
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * logprobs.mean(-1)
    if z_loss > 0.0:
        loss = loss + z_loss * lse.to(loss.dtype).square()
    return torch.where(kept, loss, torch.zeros_like(loss)), torch.where(kept, lse, torch.zeros_like(lse))


def linear_cross_entropy_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `linear_cross_entropy_backward`: dx [tokens, H] and dweight [V, H] from the gradient of the loss per
    token.

    With p = exp(z - lse):  dz_j = grad ((1 + 2 zeta lse) p_j - (1 - s) [j == y] - s / V), zero for an ignored token
    whatever its `grad`; times 1 - (z_j / c)^2 under a soft cap;  dx = dz W,  dweight = dz^T x. A gradient that is not
    needed comes back as an empty [0] tensor.
    """
    x = only_kept(target != ignore_index, x)
    logits = _capped(_logits(x, weight), softcap)
    vocabulary = weight.shape[0]
    kept = (target != ignore_index).unsqueeze(-1)
    wide_lse = lse.unsqueeze(-1).to(logits.dtype)
    lost = torch.exp(wide_lse.double() - lse.unsqueeze(-1)).to(logits.dtype)  # exp(z - lse) = exp(z - wide_lse) lost
    lost = torch.where(torch.isfinite(wide_lse), lost, torch.ones_like(lost))
    onehot = F.one_hot(torch.where(kept.squeeze(-1), target, 0), vocabulary).to(logits.dtype)
    slope = (1.0 + 2.0 * z_loss * wide_lse) * lost * torch.exp(logits - wide_lse)
    slope = slope - (1.0 - label_smoothing) * onehot - label_smoothing / vocabulary
    if softcap > 0.0:
        slope = slope * (1.0 - (logits / softcap).square())
    slope = torch.where(kept, grad.to(slope.dtype).unsqueeze(-1) * slope, torch.zeros_like(slope)).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        grad_x = only_kept(kept.squeeze(-1), slope @ weight).contiguous() if need_x else x.new_empty(0)
        grad_weight = (slope.mT @ x).contiguous() if need_weight else weight.new_empty(0)
    return grad_x, grad_weight


def compose_gradients(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The op `linear_cross_entropy_gradients` from the other two, one after the other: the summed loss over `divisor`
    (0-d), and its dx and dweight.
    """

    def gradients(
        x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, divisor: torch.Tensor, *options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        *shared, need_x, need_weight = options
        loss, lse = forward(x, weight, target, *shared)
        divisor = divisor.to(loss.dtype)
        grad = torch.ones_like(loss) / divisor
        return loss.sum() / divisor, *backward(grad, x, weight, target, lse, *shared, need_x, need_weight)

    return gradients


linear_cross_entropy_gradients = compose_gradients(linear_cross_entropy_forward, linear_cross_entropy_backward)


def check_targets(target: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Error unless each target is `ignore_index` or in [0, vocabulary); raises at once on the CPU, stops the device
    on CUDA, never synchronises. Inside a vmap the loss itself raises: an assertion has no batching rule.
    """
    if is_batched(target):
        return
    valid = (target == ignore_index) | ((target >= 0) & (target < vocabulary))
    message = f"target must hold values in [0, {vocabulary}) or ignore_index = {ignore_index}; at least one is outside"
    torch._assert_async(valid.all(), message)


def only_kept(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x with 0 in the rows of ignored tokens: what they hold, NaN included, reaches no other row and no weight."""
    return x.masked_fill(~kept.unsqueeze(-1), 0.0)


def _logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))


def _capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap > 0.0 else logits
