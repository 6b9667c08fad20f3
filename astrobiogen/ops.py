"""The catalogue of operators: every public function of `astrobiogen.kernels`, one line each."""

from astrobiogen.kernels.attention.op import attention
from astrobiogen.kernels.conv_nd.norm import conv_nd_norm
from astrobiogen.kernels.conv_nd.op import conv_nd, conv_transpose_nd
from astrobiogen.kernels.edge_attention.op import EdgeLists, edge_attention, edge_lists
from astrobiogen.kernels.linear.op import linear
from astrobiogen.kernels.linear_cross_entropy.op import linear_cross_entropy
from astrobiogen.kernels.rms_norm.op import add_rms_norm, rms_norm
from astrobiogen.kernels.rope.frequencies import (
    rope_frequencies,
    rope_frequencies_dynamic_ntk,
    rope_frequencies_linear,
    rope_frequencies_llama3,
    rope_frequencies_yarn,
    rope_gather,
    rope_positions,
)
from astrobiogen.kernels.rope.op import rope
from astrobiogen.kernels.swiglu.op import swiglu, swiglu_packed
from astrobiogen.kernels.swiglu_mlp.op import swiglu_mlp

__all__ = [
    "EdgeLists",
    "add_rms_norm",
    "attention",
    "conv_nd",
    "conv_nd_norm",
    "conv_transpose_nd",
    "edge_attention",
    "edge_lists",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_frequencies_dynamic_ntk",
    "rope_frequencies_linear",
    "rope_frequencies_llama3",
    "rope_frequencies_yarn",
    "rope_gather",
    "rope_positions",
    "swiglu",
    "swiglu_mlp",
    "swiglu_packed",
]
