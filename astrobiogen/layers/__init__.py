"""Drop-in layers over `astrobiogen.ops`; parameter names and state dicts are those of the layers they replace."""

from astrobiogen.layers.conv_nd import Conv1d, Conv2d, Conv3d, Conv4d, Conv5d, ConvNd
from astrobiogen.layers.conv_norm_act import ConvNormAct
from astrobiogen.layers.conv_transpose import (
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    ConvTranspose4d,
    ConvTranspose5d,
    ConvTransposeNd,
)
from astrobiogen.layers.grouped_query_attention import GroupedQueryAttention, KeyValueCache
from astrobiogen.layers.linear import Linear
from astrobiogen.layers.linear_cross_entropy import LinearCrossEntropy
from astrobiogen.layers.rms_norm import RMSNorm
from astrobiogen.layers.rotary_embedding import RotaryEmbedding
from astrobiogen.layers.swiglu import SwiGLU

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Conv4d",
    "Conv5d",
    "ConvNd",
    "ConvNormAct",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConvTranspose4d",
    "ConvTranspose5d",
    "ConvTransposeNd",
    "GroupedQueryAttention",
    "KeyValueCache",
    "Linear",
    "LinearCrossEntropy",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
