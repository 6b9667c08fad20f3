"""The library inside other people's models: layer swapping and the attention interface of Hugging Face transformers."""

from astrobiogen.integrations.hugging_face import register_attention
from astrobiogen.integrations.swap import Swap, SwapTable, swap_layers

__all__ = ["Swap", "SwapTable", "register_attention", "swap_layers"]
