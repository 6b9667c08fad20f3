"""Rotary position angles: cos and sin tables for `ops.rope` and `ops.attention`."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from astrobiogen.kernels.checks import check_int


class RotaryEmbedding(nn.Module):
    """Angles position · theta^(−2i/rotary), i = 0 … rotary/2 − 1, as cos and sin in fp32.

    Rotary columns come first; column i pairs with i + rotary/2 (rotate-half). No state-dict entries, as in Hugging
    Face Llama, whose `inv_freq` is not persistent either; the frequencies follow the module's device but stay fp32,
    whatever dtype it is moved to, and are computed anew by every move, so that none can lose them. The angles depend on
    differences of positions only through the rotation, so a score between query position m and key position n depends
    on m − n alone.

    Source: Su et al. 2021, arXiv:2104.09864.

    Args:
        head_dim: D of the heads.
        theta: base of the geometric frequency ladder.
        rotary_dim: number of leading columns that rotate, even, at most `head_dim`; default all of them.
        position_scale: positions are divided by this (linear position interpolation, Chen et al. 2023,
            arXiv:2306.15595).
        device: where the frequencies are.

    Raises:
        TypeError: a size is not an integer.
        ValueError: `rotary_dim` is odd or does not fit, `theta` or `position_scale` is not positive.
    """

    inverse_frequencies: torch.Tensor

    def __init__(
        self,
        head_dim: int,
        theta: float = 10_000.0,
        rotary_dim: int | None = None,
        position_scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        head_dim = check_int("head_dim", head_dim, 1)
        rotary = head_dim if rotary_dim is None else check_int("rotary_dim", rotary_dim, 0)
        if rotary < 2 or rotary % 2 or rotary > head_dim:
            raise ValueError(f"rotary_dim must be even, at least 2 and at most head_dim = {head_dim}, got {rotary}")
        if not (theta > 0 and position_scale > 0):
            raise ValueError(f"theta and position_scale must be positive, got {theta} and {position_scale}")
        self.rotary_dim = rotary
        self.theta = theta
        self.position_scale = position_scale
        self.register_buffer("inverse_frequencies", self._frequencies(device), persistent=False)

    def reset_parameters(self) -> None:
        """Compute the frequencies anew, on the device where they are."""
        buffer = self.inverse_frequencies
        if buffer.dtype == torch.float32:
            buffer.copy_(self._frequencies(buffer.device))
        else:
            self.inverse_frequencies = self._frequencies(buffer.device)

    def _frequencies(self, device: torch.device | str | None) -> torch.Tensor:
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        return self.theta**-exponents / self.position_scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Every move of the module (`to`, `half`, `to_empty`, ...) passes here: take its device, not its dtype."""
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., rotary/2] in fp32 for integer or real `positions` [S] or [B, S].

        The product position · frequency is taken in fp32, because bf16 positions repeat above 256.
        """
        frequencies = self.inverse_frequencies
        if frequencies.dtype != torch.float32:  # somebody wrote the buffer by hand
            frequencies = self._frequencies(frequencies.device)
        angles = positions.to(torch.float32)[..., None] * frequencies
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        """Sizes for `print(module)`."""
        scale = "" if self.position_scale == 1.0 else f", position_scale={self.position_scale}"
        return f"rotary_dim={self.rotary_dim}, theta={self.theta}{scale}"
