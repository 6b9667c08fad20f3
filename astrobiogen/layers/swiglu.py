"""SwiGLU feed-forward block with the parameter names of Hugging Face Llama."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels import autocast
from astrobiogen.kernels.checks import check_int
from astrobiogen.layers.children import PLAIN_TENSORS, globally_hooked, is_plain, project, reset_children
from astrobiogen.layers.linear import LINEAR, Linear

ALIGNMENT = (
    64  # elements: 128 bytes in 16-bit types, a whole tensor-core tile in every GEMM that touches the intermediate axis
)


class PaddedLinear(Linear):
    """A `Linear` whose last output rows or input columns are padding: `reset_parameters` leaves them zero.

    Args:
        in_features: columns, padding included.
        out_features: rows, padding included.
        bias: add a bias.
        padding_in: columns of padding.
        padding_out: rows of padding.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, padding_in: int = 0, padding_out: int = 0, **place: Any
    ) -> None:
        self.padding_in, self.padding_out = padding_in, padding_out
        super().__init__(in_features, out_features, bias, **place)

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear`, then zeros in the padding."""
        super().reset_parameters()
        self.zero_padding_()

    def zero_padding_(self) -> None:
        """Set the padding to zero."""
        _zero_behind(self.weight, 1, self.in_features - self.padding_in)
        _zero_behind(self.weight, 0, self.out_features - self.padding_out)
        if self.bias is not None:
            _zero_behind(self.bias, 0, self.out_features - self.padding_out)


@torch.no_grad()
def _zero_behind(tensor: torch.Tensor, axis: int, start: int) -> None:
    if type(tensor) in PLAIN_TENSORS:
        tensor.narrow(axis, start, tensor.shape[axis] - start).zero_()
    else:  # a slice of a sharded tensor is a copy, so places are counted
        tensor.masked_fill_(torch.ones_like(tensor, dtype=torch.float32).cumsum(axis) > start, 0.0)


_LINEAR = (*LINEAR, PaddedLinear)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)), x [..., hidden_size].

    Parameters: `gate_proj.weight`, `up_proj.weight` [I, H], `down_proj.weight` [H, I], and biases with `bias=True`, as
    in Hugging Face Llama. The three projections are computed in one pass while they are plain linear layers; one with a
    hook, an adapter, a parametrisation, another class or another kind of weight is called as a module.

    With `pad_intermediate=True` the weights are held with I rounded up to a multiple of 64; the extra rows and columns
    are zero, their gradients are exactly zero (silu(0)·0 = 0 feeds zero weights), so the function stays the same. The
    state dict has the unpadded shapes; its values are views of the parameters, so writing into them changes the layer
    (`down_proj.weight` has rows of the padded length: `.contiguous()` is the caller's where a file format asks for it).
    Of sharded parameters there are no such views: their entries keep the padded shapes. Either shape loads.

    With `recompute=True` the product silu(gate)·up is not kept for the gradient of `down_proj.weight`: the backward
    kernel, which reads gate and up anyway, writes it again (48 MB less per layer at [2048, 11605] in half precision).
    That needs a plain `down_proj`; another one is called, and keeps what it keeps.

    Source: Shazeer 2020, arXiv:2002.05202.

    Args:
        hidden_size: H.
        intermediate_size: I.
        bias: add biases to the three projections.
        pad_intermediate: hold padded weights, for GEMM alignment.
        recompute: compute the product again in the backward pass instead of keeping it.

    Raises:
        TypeError: a size is not an integer.
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
        self.hidden_size = check_int("hidden_size", hidden_size, 1)
        self.intermediate_size = check_int("intermediate_size", intermediate_size, 1)
        self.recompute = recompute
        self.padding = -self.intermediate_size % ALIGNMENT if pad_intermediate else 0
        held = self.intermediate_size + self.padding
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.padding:
            self.gate_proj: nn.Module = PaddedLinear(self.hidden_size, held, bias, padding_out=self.padding, **place)
            self.up_proj: nn.Module = PaddedLinear(self.hidden_size, held, bias, padding_out=self.padding, **place)
            self.down_proj: nn.Module = PaddedLinear(held, self.hidden_size, bias, padding_in=self.padding, **place)
            self.register_state_dict_post_hook(_trim_state)
            self.register_load_state_dict_pre_hook(_pad_state)
        else:
            self.gate_proj = Linear(self.hidden_size, held, bias, **place)
            self.up_proj = Linear(self.hidden_size, held, bias, **place)
            self.down_proj = Linear(held, self.hidden_size, bias, **place)

    def reset_parameters(self) -> None:
        """Initialise the projections as `torch.nn.Linear` does."""
        reset_children(self)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """`torch.nn.Module.apply`; what `fn` wrote into the padding is zero again."""
        super().apply(fn)
        self.zero_padding_()
        return self

    def zero_padding_(self) -> None:
        """Set the padded rows and columns to zero; call after writing the weights by hand."""
        for projection in self.children():
            if isinstance(projection, PaddedLinear):
                projection.zero_padding_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., H] to [..., H]."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x: last axis (hidden) has {x.shape[-1]} elements, expected hidden_size = {self.hidden_size}"
            )
        children: Any = self._modules  # the attributes would be searched for by name
        gate_proj, up_proj, down_proj = children["gate_proj"], children["up_proj"], children["down_proj"]
        readable = is_plain(down_proj, _LINEAR) and not globally_hooked()
        if readable and not self.recompute and is_plain(gate_proj, _LINEAR) and is_plain(up_proj, _LINEAR):
            gate, up, down = gate_proj._parameters, up_proj._parameters, down_proj._parameters
            if gate["bias"] is None and up["bias"] is None and down["bias"] is None:
                return ops.swiglu_mlp(x, gate["weight"], up["weight"], down["weight"])
        gate, up = project(gate_proj, _LINEAR, x), project(up_proj, _LINEAR, x)
        if not (readable and self.recompute):
            return project(down_proj, _LINEAR, ops.swiglu(gate, up))
        gate, up, weight = autocast.lower_precision(gate, up, down_proj._parameters["weight"])
        out, bias = _Down.apply(gate, up, weight), down_proj._parameters["bias"]
        return out if bias is None else out + bias.to(out.dtype)

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
        kind = grad.device.type
        with contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
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
        if type(state[key]) in PLAIN_TENSORS:
            state[key] = state[key].narrow(axis, 0, module.intermediate_size)  # a view: what is written there counts


def _pad_state(module: SwiGLU, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    for key, axis in _axes(prefix, state):
        if state[key].shape[axis] != module.intermediate_size:
            continue  # load_state_dict reports the mismatch
        shape = list(state[key].shape)
        shape[axis] = module.padding
        state[key] = torch.cat([state[key], state[key].new_zeros(shape)], dim=axis)
