"""Rotary position angles: cos and sin tables for `ops.rope` and `ops.attention`."""

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Angles position · theta^(−2i/rotary), i = 0 … rotary/2 − 1, as cos and sin in fp32.

    Rotary columns come first; column i pairs with i + rotary/2 (rotate-half). No state-dict entries, as in Hugging
    Face Llama, whose `inv_freq` is not persistent either. The angles depend on differences of positions only through
    the rotation, so a score between query position m and key position n depends on m − n alone.

    Source: Su et al. 2021, arXiv:2104.09864.

    Args:
        head_dim: D of the heads.
        theta: base of the geometric frequency ladder.
        rotary_dim: number of leading columns that rotate, even, at most `head_dim`; default all of them.
        position_scale: positions are divided by this (linear position interpolation, Chen et al. 2023,
            arXiv:2306.15595).

    Raises:
        ValueError: `rotary_dim` is odd or does not fit, `theta` or `position_scale` is not positive.
    """

    inverse_frequencies: torch.Tensor

    def __init__(
        self, head_dim: int, theta: float = 10_000.0, rotary_dim: int | None = None, position_scale: float = 1.0
    ) -> None:
        super().__init__()
        rotary = head_dim if rotary_dim is None else rotary_dim
        if rotary < 2 or rotary % 2 or rotary > head_dim:
            raise ValueError(f"rotary_dim must be even, at least 2 and at most head_dim = {head_dim}, got {rotary}")
        if theta <= 0 or position_scale <= 0:
            raise ValueError(f"theta and position_scale must be positive, got {theta} and {position_scale}")
        self.rotary_dim = rotary
        self.theta = theta
        self.position_scale = position_scale
        exponents = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
        self.register_buffer("inverse_frequencies", theta**-exponents / position_scale, persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., rotary/2] in fp32 for integer or real `positions` [S] or [B, S].

        The product position · frequency is taken in fp32 whatever the module's dtype, because bf16 positions repeat
        above 256.
        """
        angles = positions.to(torch.float32)[..., None] * self.inverse_frequencies.to(torch.float32)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        return f"rotary_dim={self.rotary_dim}, theta={self.theta}, position_scale={self.position_scale}"
