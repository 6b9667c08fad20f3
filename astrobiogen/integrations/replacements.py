"""Layers that take the place of somebody else's: the same parameters and children under the same names."""

from typing import Any

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.integrations.formulas import GatedMLP, Norm
from astrobiogen.layers import RMSNorm
from astrobiogen.layers.children import globally_hooked, is_plain, project
from astrobiogen.layers.linear import LINEAR


class FormulaRMSNorm(RMSNorm):
    """`RMSNorm` with the weight counted from an offset and the dtype of the norm that it replaces.

    y = x / sqrt(mean(x²) + eps) · (offset + weight), in the dtype of x, or in the one that x and weight promote to.

    Args:
        hidden_size: H.
        formula: eps, offset and dtype.
    """

    eps: float  # type: ignore[assignment]
    offset = 0.0
    input_dtype = True

    def __init__(self, hidden_size: int, formula: Norm, *, device: torch.device | str | None = None) -> None:
        super().__init__(hidden_size, formula.eps, device=device)
        self.offset, self.input_dtype = formula.offset, formula.input_dtype
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Such that offset + weight is one."""
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Normalise `x` [..., H]."""
        weight = self.weight
        if not self.input_dtype and x.dtype != weight.dtype:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        if self.offset:
            weight = self.offset + (weight if weight.dtype == torch.float64 else weight.float())
        return ops.rms_norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        """Sizes and the offset for `print(module)`."""
        return f"{super().extra_repr()}, offset={self.offset:g}"


class FormulaSwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) over children of any names; gate and up may be the halves of one projection.

    As in `layers.SwiGLU`, plain projections are computed in one pass and all others are called.

    Args:
        formula: names of the children.
    """

    def __init__(self, formula: GatedMLP) -> None:
        super().__init__()
        self.formula = formula
        for name in (formula.gate, formula.up, formula.down):
            self._modules[name] = None  # the one that replaces an MLP puts the MLP's own here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., H] to [..., H]."""
        children: Any = self._modules
        names = self.formula
        gate_proj, up_proj, down_proj = children[names.gate], children[names.up], children[names.down]
        if names.packed:
            gate, up = project(gate_proj, LINEAR, x).chunk(2, dim=-1)
            return project(down_proj, LINEAR, ops.swiglu(gate, up))
        parts = (gate_proj, up_proj, down_proj)
        if all(is_plain(part, LINEAR) and part._parameters["bias"] is None for part in parts) and not globally_hooked():
            return ops.swiglu_mlp(x, *(part._parameters["weight"] for part in parts))
        return project(down_proj, LINEAR, ops.swiglu(project(gate_proj, LINEAR, x), project(up_proj, LINEAR, x)))
