"""Convolution, norm over channels and activation as one module."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.kernels.checks import check_int
from astrobiogen.kernels.conv_nd.norm import NormKind
from astrobiogen.kernels.conv_nd.op import Activation
from astrobiogen.layers.children import globally_hooked, is_plain, reset_children
from astrobiogen.layers.conv_nd import ConvNd
from astrobiogen.layers.rms_norm import RMSNorm

_NORMS: dict[NormKind, tuple[type[nn.Module]]] = {"rms": (RMSNorm,), "layer": (nn.LayerNorm,), "group": (nn.GroupNorm,)}
_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda z: z, "silu": F.silu, "gelu": F.gelu
}  # fmt: skip


class ConvNormAct(nn.Module):
    """act(norm(conv(x))) in one pass where the kernels allow: x [B, C, *spatial] -> [B, O, *out].

    State dict: `conv.weight`, `conv.bias` as `ConvNd`, `norm.weight` (and `norm.bias` for "layer" and "group") as
    `RMSNorm`, `torch.nn.LayerNorm`, `torch.nn.GroupNorm`; see `ops.conv_nd_norm` for the formula. The result has the
    memory layout that `ConvNd` documents.

    One pass serves while `conv` and `norm` are plain layers of these classes; if one has a hook, a parametrisation,
    another class or another kind of weight, both are called as modules, `norm` on [B, *out, O] ("group": on
    [B, O, *out]).

    Args:
        n_axes: number of spatial axes, 1 to 5.
        in_channels: C.
        out_channels: O.
        kernel_size: an int or one per axis.
        norm: "rms", "layer" (over the channels of each position) or "group".
        norm_groups: groups of a "group" norm, divides O.
        eps: added to the variance.
        activation: None, "silu" or "gelu".
        **options: `stride`, `padding`, `dilation`, `groups`, `bias`, `padding_mode`, `memory_format`, `device`, `dtype`
            of `ConvNd`.

    Raises:
        TypeError: a size is not an integer.
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
        norm_groups = check_int("norm_groups", norm_groups, 0)
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
        self.n_axes = self.conv.n_axes
        self.kind: NormKind = norm
        self.norm_groups = norm_groups
        self.eps = eps
        self.activation: Activation = activation

    def reset_parameters(self) -> None:
        """Initialise the convolution and the norm as they do themselves."""
        reset_children(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [B, C, *spatial] or [C, *spatial]."""
        children: Any = self._modules  # the attributes would be searched for by name
        conv, norm = children["conv"], children["norm"]
        if not self._readable(conv, norm):
            return self._call(conv, norm, x)
        conv_weights, norm_weights = conv._parameters, norm._parameters
        return ops.conv_nd_norm(
            x,
            conv_weights["weight"],
            conv_weights["bias"],
            norm_weights["weight"],
            norm_weights.get("bias"),
            norm=self.kind,
            norm_groups=self.norm_groups,
            eps=norm.eps,
            stride=conv.stride,
            padding=conv.padding,
            padding_mode=conv.padding_mode,
            dilation=conv.dilation,
            groups=conv.groups,
            activation=self.activation,
            memory_format=conv.memory_format,
        )

    def _readable(self, conv: Any, norm: Any) -> bool:
        """Whether both children are what the fused pass computes."""
        if not (is_plain(conv, (ConvNd,)) and is_plain(norm, _NORMS[self.kind])) or globally_hooked():
            return False
        weight = norm._parameters["weight"]
        return (
            conv.activation is None
            and norm.eps is not None
            and (weight is None or weight.dtype == conv._parameters["weight"].dtype)
            and (self.kind != "group" or norm.num_groups == self.norm_groups)
        )

    def _call(self, conv: Any, norm: Any, x: torch.Tensor) -> torch.Tensor:
        z = conv(x)
        channel = z.dim() - self.n_axes - 1
        if self.kind == "group":
            normed = norm(z) if channel else norm(z.unsqueeze(0)).squeeze(0)
        else:  # over the channels of a position: they go last
            normed = norm(z.movedim(channel, -1)).movedim(-1, channel)
        normed = normed.contiguous() if z.is_contiguous() else normed
        return _ACTIVATIONS[self.activation](normed)
