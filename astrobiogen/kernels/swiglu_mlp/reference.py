"""The SwiGLU block in plain PyTorch: the definition that the kernel is held to.

y = (silu(x Gᵀ) · (x Uᵀ)) Dᵀ      (Shazeer 2020, arXiv:2002.05202)
"""

import torch
import torch.nn.functional as F

from astrobiogen.kernels.swiglu import reference as swiglu


def swiglu_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """y [..., H] of x [..., H], gate and up [I, H], down [H, I]."""
    return F.linear(swiglu.swiglu(F.linear(x, gate), F.linear(x, up)), down)


def swiglu_mlp_op(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `swiglu_mlp`: y, and x Gᵀ and x Uᵀ side by side [rows, 2 I] for the backward pass."""
    both = x.flatten(0, -2) @ torch.cat([gate, up]).t()
    return F.linear(swiglu.swiglu_packed(both), down).view(x.shape), both


def swiglu_mlp_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `swiglu_mlp_backward`: gradients of x, gate, up and down; an empty tensor for one that is not needed."""
    rows, of_rows = x.flatten(0, -2), grad.flatten(0, -2)
    of_gates = swiglu.swiglu_packed_backward(of_rows @ down, gates)
    grad_x = (of_gates @ torch.cat([gate, up])).view(x.shape) if need_x else x.new_empty(0)
    if not need_weights:
        return grad_x, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    of_gate, of_up = (half.t() @ rows for half in of_gates.chunk(2, dim=1))
    return grad_x, of_gate, of_up, of_rows.t() @ swiglu.swiglu_packed(gates)
