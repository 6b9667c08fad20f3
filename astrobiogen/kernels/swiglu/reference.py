"""SwiGLU in plain PyTorch: the definition that the kernels are held to.

h = silu(gate) * up,  silu(g) = g * sigmoid(g)      (Shazeer 2020, arXiv:2002.05202)

Everything is taken in fp32 (fp64 for fp64 input) and rounded once to the dtype of gate.
"""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """h [..., I] from gate and up [..., I]; differentiable any number of times."""
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    product = torch.nn.functional.silu(gate.to(accumulate)) * up.to(accumulate)
    return product.to(gate.dtype).contiguous()


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    """h [..., I] from gate_up [..., 2 I], gate in the first half of the last axis."""
    return swiglu(*gate_up.chunk(2, dim=-1))


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `swiglu_backward`: dgate and dup [..., I] from the gradient of h.

    With s = sigmoid(gate):  dgate = grad * up * s * (1 + gate * (1 - s)),  dup = grad * gate * s.  1 - s is taken as
    sigmoid(-gate), which
    keeps its relative accuracy where s is close to 1.
    """
    accumulate = torch.promote_types(gate.dtype, torch.float32)
    wide_gate, wide_grad = gate.to(accumulate), grad.to(accumulate)
    sigmoid = torch.sigmoid(wide_gate)
    grad_gate = wide_grad * up.to(accumulate) * sigmoid * (1.0 + wide_gate * torch.sigmoid(-wide_gate))
    grad_up = wide_grad * (wide_gate * sigmoid)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


def swiglu_packed_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The op `swiglu_packed_backward`: the gradient of gate_up, [..., 2 I]."""
    return torch.cat(swiglu_backward(grad, *gate_up.chunk(2, dim=-1)), dim=-1)


def swiglu_backward_product(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `swiglu_backward_product`: dgate, dup and h = silu(gate) * up again, so that h need not be kept for the
    backward pass."""
    return *swiglu_backward(grad, gate, up), swiglu(gate, up)
