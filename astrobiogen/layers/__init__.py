"""Drop-in layers over `astrobiogen.ops`; parameter names and state dicts are those of the layers they replace."""

from astrobiogen.layers.conv_nd import Conv4d as Conv4d
from astrobiogen.layers.conv_nd import Conv5d as Conv5d
from astrobiogen.layers.conv_nd import ConvNd as ConvNd
from astrobiogen.layers.conv_norm_act import ConvNormAct as ConvNormAct
from astrobiogen.layers.grouped_query_attention import GroupedQueryAttention as GroupedQueryAttention
from astrobiogen.layers.grouped_query_attention import KeyValueCache as KeyValueCache
from astrobiogen.layers.linear import Linear as Linear
from astrobiogen.layers.linear_cross_entropy import LinearCrossEntropy as LinearCrossEntropy
from astrobiogen.layers.rms_norm import RMSNorm as RMSNorm
from astrobiogen.layers.rotary_embedding import RotaryEmbedding as RotaryEmbedding
from astrobiogen.layers.swiglu import SwiGLU as SwiGLU

__all__ = [
    "Conv4d",
    "Conv5d",
    "ConvNd",
    "ConvNormAct",
    "GroupedQueryAttention",
    "KeyValueCache",
    "Linear",
    "LinearCrossEntropy",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
