"""Convolution, norm over channels and activation as one module."""

from typing import Any

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.conv_nd.norm import NormKind
from astrobiogen.kernels.conv_nd.op import Activation
from astrobiogen.layers._autocast import autocast_tensors
from astrobiogen.layers.conv_nd import ConvNd
from astrobiogen.layers.rms_norm import RMSNorm


class ConvNormAct(nn.Module):
    """act(norm(conv(x))) in one pass where the kernels allow: x [B, C, *spatial] -> [B, O, *out].

    State dict: `conv.weight`, `conv.bias` as `ConvNd`, `norm.weight` (and `norm.bias` for "layer" and "group") as
    `RMSNorm`, `torch.nn.LayerNorm`, `torch.nn.GroupNorm`; see `ops.conv_nd_norm` for the formula.

    Args:
        n_axes: number of spatial axes, 1 to 5.
        in_channels: C.
        out_channels: O.
        kernel_size: an int or one per axis.
        norm: "rms", "layer" (over the channels of each position) or "group".
        norm_groups: groups of a "group" norm, divides O.
        eps: added to the variance.
        activation: None, "silu" or "gelu".
        **options: `stride`, `padding`, `dilation`, `groups`, `bias`, `padding_mode`, `device`, `dtype` of `ConvNd`.

    Raises:
        ValueError: sizes do not fit; from `forward`, as `ops.conv_nd_norm`.
    """

    def __init__(
        self,
        n_axes: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        norm: NormKind = "rms",
        norm_groups: int = 1,
        eps: float = 1e-5,
        activation: Activation = "silu",
        **options: Any,
    ) -> None:
        super().__init__()
        if norm not in ("rms", "layer", "group"):
            raise ValueError(f"norm must be 'rms', 'layer' or 'group', got {norm!r}")
        if norm_groups < 1 or out_channels % norm_groups or (norm != "group" and norm_groups != 1):
            raise ValueError(
                f"norm_groups = {norm_groups} must divide out_channels = {out_channels} (1 for norm={norm!r})"
            )
        self.conv = ConvNd(n_axes, in_channels, out_channels, kernel_size, **options)
        place: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        if norm == "rms":
            self.norm: RMSNorm | nn.LayerNorm | nn.GroupNorm = RMSNorm(out_channels, eps=eps, **place)
        elif norm == "layer":
            self.norm = nn.LayerNorm(out_channels, eps=eps, **place)
        else:
            self.norm = nn.GroupNorm(norm_groups, out_channels, eps=eps, **place)
        self.kind: NormKind = norm
        self.norm_groups = norm_groups
        self.eps = eps
        self.activation: Activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [B, C, *spatial]."""
        conv = self.conv
        norm_weight, norm_bias = self.norm.weight, getattr(self.norm, "bias", None)
        tensors = autocast_tensors(x, conv.weight, conv.bias, norm_weight, norm_bias)
        return ops.conv_nd_norm(
            *tensors,
            norm=self.kind,
            norm_groups=self.norm_groups,
            eps=self.eps,
            stride=conv.stride,
            padding=conv.padding,
            padding_mode=conv.padding_mode,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=self.activation,
        )
