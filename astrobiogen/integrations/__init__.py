"""The library inside other people's models: layer swapping and the attention interface of Hugging Face transformers."""

from astrobiogen.integrations.hugging_face import register_attention as register_attention
from astrobiogen.integrations.swap import Swap as Swap
from astrobiogen.integrations.swap import SwapTable as SwapTable
from astrobiogen.integrations.swap import swap_layers as swap_layers

__all__ = ["Swap", "SwapTable", "register_attention", "swap_layers"]
