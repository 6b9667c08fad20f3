"""SwiGLU feed-forward block with the parameter names of Hugging Face Llama."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.layers._autocast import autocast_tensors
from astrobiogen.layers.linear import Linear

ALIGNMENT = (
    64  # elements: 128 bytes in 16-bit types, a whole tensor-core tile in every GEMM that touches the intermediate axis
)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)), x [..., hidden_size].

    Parameters: `gate_proj.weight`, `up_proj.weight` [I, H], `down_proj.weight` [H, I], and biases with `bias=True`,
        as in
    Hugging Face Llama. With `pad_intermediate=True` the weights are held with I rounded up to a multiple of 64; the
    extra rows and columns are zero, their gradients are exactly zero (silu(0)·0 = 0 feeds zero weights), so the
    function stays the same, and the state dict keeps the unpadded shapes.

    With `recompute=True` the product silu(gate)·up is not kept for the gradient of `down_proj.weight`: the backward
    kernel, which reads gate and up anyway, writes it again (48 MB less per layer at [2048, 11605] in half precision).

    Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        hidden_size: H.
        intermediate_size: I.
        bias: add biases to the three projections.
        pad_intermediate: hold padded weights, for GEMM alignment.
        recompute: compute the product again in the backward pass instead of keeping it.

    Raises:
        ValueError: a size is not positive; from `forward`, the last axis of `x` is not `hidden_size`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        pad_intermediate: bool = False,
        recompute: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or intermediate_size < 1:
            raise ValueError(
                f"hidden_size and intermediate_size must be at least 1, got {hidden_size} and {intermediate_size}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.recompute = recompute
        held = -(-intermediate_size // ALIGNMENT) * ALIGNMENT if pad_intermediate else intermediate_size
        self.gate_proj = Linear(hidden_size, held, bias=bias, device=device, dtype=dtype)
        self.up_proj = Linear(hidden_size, held, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(held, hidden_size, bias=bias, device=device, dtype=dtype)
        self.padding = held - intermediate_size
        if self.padding:
            self.zero_padding_()
            self.register_state_dict_post_hook(_trim_state)
            self.register_load_state_dict_pre_hook(_pad_state)

    def zero_padding_(self) -> None:
        """Set the padded rows and columns to zero; call after initialising the weights by hand."""
        if not self.padding:
            return
        with torch.no_grad():
            for projection in (self.gate_proj, self.up_proj):
                for parameter in projection.parameters():
                    parameter[self.intermediate_size :] = 0
            self.down_proj.weight[:, self.intermediate_size :] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., H] to [..., H]."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x: last axis (hidden) has {x.shape[-1]} elements, expected hidden_size = {self.hidden_size}"
            )
        if not self.recompute and self.down_proj.bias is None:
            return ops.swiglu_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not self.recompute:
            return self.down_proj(ops.swiglu(gate, up))
        gate, up, weight = autocast_tensors(gate, up, self.down_proj.weight)
        out = _Down.apply(gate, up, weight)
        return out if self.down_proj.bias is None else out + self.down_proj.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"{self.hidden_size}, {self.intermediate_size}, padding={self.padding}"


class _Down(torch.autograd.Function):
    """swiglu(gate, up) W^T that saves gate, up and W only."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return ops.swiglu(gate, up) @ weight.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, weight = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_gate, grad_up, product = torch.ops.astrobiogen.swiglu_backward_product(grad @ weight, gate, up)
            return grad_gate, grad_up, grad.flatten(0, -2).T @ product.flatten(0, -2)


def _axes(prefix: str, state: Mapping[str, Any]) -> list[tuple[str, int]]:
    keys = [
        ("gate_proj.weight", 0),
        ("gate_proj.bias", 0),
        ("up_proj.weight", 0),
        ("up_proj.bias", 0),
        ("down_proj.weight", 1),
    ]
    return [(prefix + key, axis) for key, axis in keys if prefix + key in state]


def _trim_state(module: SwiGLU, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key, axis in _axes(prefix, state):
        state[key] = state[key].narrow(axis, 0, module.intermediate_size).contiguous()


def _pad_state(module: SwiGLU, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    for key, axis in _axes(prefix, state):
        if state[key].shape[axis] != module.intermediate_size:
            continue  # load_state_dict reports the mismatch
        shape = list(state[key].shape)
        shape[axis] = module.padding
        state[key] = torch.cat([state[key], state[key].new_zeros(shape)], dim=axis)
