"""The library inside other people's models: layer swapping and the attention interface of Hugging Face transformers."""

from astrobiogen.integrations.hugging_face import register_attention
from astrobiogen.integrations.swap import swap_layers
from astrobiogen.integrations.table import Swap, SwapTable

__all__ = ["Swap", "SwapTable", "register_attention", "swap_layers"]
