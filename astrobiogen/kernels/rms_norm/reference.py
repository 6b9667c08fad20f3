"""RMSNorm in plain PyTorch: the definition that the kernels are held to.

y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2, last axis) + eps)      (Zhang and Sennrich 2019, arXiv:1910.07467)

Statistics and products are taken in fp32 (fp64 for fp64 input) and rounded once to the dtype of x.
"""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y [..., H] from x [..., H] and weight [H]; differentiable any number of times."""
    return rms_norm_forward(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to their dtype."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `rms_norm`: y [..., H] and rstd [...] in the accumulation dtype."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(accumulate)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd * weight.to(accumulate)).to(x.dtype)
    return y.contiguous(), rstd.squeeze(-1).contiguous()


def add_rms_norm_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `add_rms_norm`: y, the sum x + residual, and rstd."""
    total = (x + residual).contiguous()
    y, rstd = rms_norm_forward(total, weight, eps)
    return y, total, rstd


def rms_norm_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `rms_norm_backward`: dx [..., H] and dweight [H].

    With n = x * rstd and g = grad_y * weight:  dx = rstd * (g - n * mean(g * n)) + grad_sum,  dweight = sum over rows
    of grad_y * n.
    `grad_sum` is the gradient that reaches x + residual on its other way out (`add_rms_norm`), or None.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    scale = rstd.unsqueeze(-1)
    normalised = x.to(accumulate) * scale
    grad = grad_y.to(accumulate)
    weighted = grad * weight.to(accumulate)
    grad_x = scale * (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(accumulate)
    grad_weight = (grad * normalised).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)
