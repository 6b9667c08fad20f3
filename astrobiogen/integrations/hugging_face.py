"""The attention interface of Hugging Face transformers (optional: extra `hf`), under the name "astrobiogen"."""

import importlib
from typing import Any

import torch

from astrobiogen import ops

NAME = "astrobiogen"
_LARGEST_HEAD = 256


def register_attention() -> str:
    """Register `ops.attention` with transformers; returns the name for `model.set_attn_implementation(...)` or
    `from_pretrained(..., attn_implementation=...)`.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        modeling = importlib.import_module("transformers.modeling_utils")
        masking = importlib.import_module("transformers.masking_utils")
    except ImportError as error:
        raise ImportError(f"register_attention needs transformers: pip install 'astrobiogen[hf]' ({error})") from error
    modeling.ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    masking.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)
    return NAME


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """None where the mask is causal, perhaps with a sliding window, without padding and with the queries at the end of
    the keys: `ops.attention` then needs none. Otherwise the bool [B, 1, Sq, Sk] mask of transformers.
    """
    masking = importlib.import_module("transformers.masking_utils")
    function = mask_function or masking.causal_mask_function
    at_the_end = int(kv_length) + int(kv_offset) == int(q_length) + int(q_offset)  # not in a static cache
    whole = attention_mask is None or bool(attention_mask[:, -(kv_length + kv_offset) :].all())
    plain = function is masking.causal_mask_function or (local_size is not None and _slides(function, local_size))
    if allow_is_causal_skip and at_the_end and whole and plain:
        return None
    return masking.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, local_size,
        allow_is_causal_skip=False, **options,
    )  # fmt: skip


def _slides(function: Any, width: int) -> bool:
    """Whether `function` is the causal window of `width` keys (chunks of that width differ at position `width`)."""
    zero, query = torch.tensor(0), torch.tensor(width)
    keys = (0, 1, width, width + 1) if width > 1 else (0, width, width + 1)
    seen = [bool(function(zero, zero, query, torch.tensor(key))) for key in keys]
    return seen == [0 < key <= width for key in keys]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`ops.attention` as transformers calls it: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D], already rotated;
    returns [B, Sq, Hq, D].

    With a mask (padding, packed rows, a static cache), dropout or a position bias, which `ops.attention` does not
    have, transformers' own "sdpa" serves, and a warning says so once.
    """
    reasons = {
        "a mask (padding, packed rows or a static cache)": attention_mask is not None,
        "dropout": bool(dropout),
        "a position bias": options.get("position_bias") is not None,
        f"a head of more than {_LARGEST_HEAD}": query.shape[-1] > _LARGEST_HEAD,
        "values of another size than keys": value.shape[-1] != key.shape[-1],
    }
    if any(reasons.values()):
        why = ", ".join(name for name, holds in reasons.items() if holds)
        logger = importlib.import_module("transformers.utils.logging").get_logger(__name__)
        logger.warning_once(f"astrobiogen attention: transformers' sdpa serves calls with {why}")
        sdpa = importlib.import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
        extra = {"softcap": softcap} if softcap is not None else {}
        return sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, **extra, **options)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    out = ops.attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        causal=causal, scale=scaling, window=sliding_window, softcap=softcap,
    )  # fmt: skip
    return out, None
