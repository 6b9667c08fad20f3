"""Transformer over patch tokens of a grid with any number of axes; positions are sums of one table per axis."""

from collections.abc import Sequence

import torch
from torch import nn

from astrobiogen.layers import ConvNd, GroupedQueryAttention, RMSNorm, SwiGLU
from astrobiogen.models.common import check_axes, maybe_checkpoint


class GridTransformer(nn.Module):
    """Feature map [B, C, *grid] -> patch tokens -> pre-norm encoder -> mean token [B, embed_dim].

    Args:
        channels: C.
        grid: sizes of the feature map's axes; each a multiple of its patch.
        axes: names of the axes, for messages.
        patch: patch size per axis.
        embed_dim: token width.
        num_heads: divides `embed_dim`.
        num_layers: encoder blocks.
        dropout: on both branches of every block, in training.
        checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        grid: Sequence[int],
        axes: Sequence[str],
        patch: Sequence[int],
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        for axis, size, step in zip(axes, grid, patch):
            if size % step:
                raise ValueError(
                    f"vit_patch_size on axis {axis!r}: {step} does not divide the feature map's size {size}"
                )
        self.axes = tuple(axes)
        self.grid = tuple(grid)
        self.checkpointing = checkpointing
        self.patches = ConvNd(
            len(grid), channels, embed_dim, tuple(patch), stride=tuple(patch), memory_format="channels_last"
        )
        tables = [torch.empty(size // step, embed_dim).normal_(std=0.02) for size, step in zip(grid, patch)]
        self.positions = nn.ParameterList(nn.Parameter(table) for table in tables)
        self.layers = nn.ModuleList(EncoderLayer(embed_dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = RMSNorm(embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode x [B, C, *grid] into [B, embed_dim]."""
        check_axes("feature map", x, ("batch", "channel", *self.axes), dict(zip(self.axes, self.grid)))
        tokens = self.patches(x).movedim(1, -1)
        for axis, table in enumerate(self.positions):
            shape = [1] * (len(self.grid) + 2)
            shape[axis + 1], shape[-1] = table.shape
            tokens = tokens + table.view(shape)
        tokens = tokens.flatten(1, -2)
        for layer in self.layers:
            tokens = maybe_checkpoint(self.checkpointing, layer, tokens)
        return self.norm(tokens).mean(1)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over all tokens (no mask) and SwiGLU.

    Args:
        width: token width.
        num_heads: divides `width`.
        dropout: on both branches, in training.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = GroupedQueryAttention(width, num_heads, causal=False)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens [B, S, width] to [B, S, width]."""
        attended = self.dropout(self.attention(self.attention_norm(x)))
        normed, x = self.mlp_norm(attended, x)
        return x + self.dropout(self.mlp(normed))
