"""The attention interface of Hugging Face transformers (optional: extra `hf`), under the name "astrobiogen"."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from astrobiogen import ops

NAME = "astrobiogen"
_LARGEST_HEAD = 256
# What models pass on to every interface and attention does not depend on: outputs of other parts, positions that are
# already in the rotated keys, lengths that the bounds of packed sequences tell as well.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "seq_idx", "shift_labels", "use_cache",
})  # fmt: skip


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
) -> torch.Tensor:
    """The bool [B, 1, Sq, Sk] mask of transformers; or, where it is causal, perhaps with a sliding window, without
    padding and with the queries at the end of the keys, one without rows that says so: [1, 1 + W, 0, 2 Sk + 1] for a
    window of W keys, W = 0 for none. `attention_forward` reads it, and knows by the odd last axis whether a model has
    added keys to it on the way.
    """
    masking = importlib.import_module("transformers.masking_utils")
    function = mask_function or masking.causal_mask_function
    at_the_end = int(kv_length) + int(kv_offset) == int(q_length) + int(q_offset)  # not in a static cache
    whole = attention_mask is None or bool(attention_mask[:, -(kv_length + kv_offset) :].all())
    slides = local_size is not None and _slides(function, local_size)
    if allow_is_causal_skip and at_the_end and whole and (slides or function is masking.causal_mask_function):
        width = int(local_size) if slides and local_size is not None else 0
        return torch.empty(1, 1 + width, 0, 2 * int(kv_length) + 1, dtype=torch.bool, device=options.get("device"))
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
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`ops.attention` as transformers calls it: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D], already rotated;
    returns [B, Sq, Hq, D].

    A mask without rows is that of `attention_mask`: causal, with its window or none, whatever `sliding_window` says:
    layers may leave it out where their mask has it, and name it where it has none.

    A mask (padding, packed rows, a static cache), dropout, a position bias, values of another width and heads of more
    than 256 columns are not `ops.attention`'s: plain PyTorch serves such calls, with everything else that the call asks
    for, and a warning says so once.

    Raises:
        ValueError: keys were added to a mask without rows, an argument that may change the result is not known here (a
            paged cache, attention weights as output), or the bounds of packed sequences are not those of one row of
            queries and keys alike.
    """
    unknown = sorted(name for name, given in options.items() if name not in _WITHOUT_EFFECT and _is_set(given))
    if unknown:
        raise ValueError(
            f"the attention interface {NAME!r} of {type(module).__name__} does not take {', '.join(unknown)}: "
            "choose another one with model.set_attn_implementation('eager')"
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[2] == 0:
        causal, sliding_window, attention_mask = True, _width(module, attention_mask, key.shape[2]), None
    bounds = _packed(cu_seq_lens_q, cu_seq_lens_k, query, key)
    reasons = {
        "a mask (padding, packed rows or a static cache)": attention_mask is not None,
        "dropout": bool(dropout),
        "a position bias": position_bias is not None,
        f"a head of more than {_LARGEST_HEAD}": query.shape[-1] > _LARGEST_HEAD,
        "values of another size than keys": value.shape[-1] != key.shape[-1],
    }
    if any(reasons.values()):
        why = ", ".join(name for name, holds in reasons.items() if holds)
        logger = importlib.import_module("transformers.utils.logging").get_logger(__name__)
        logger.warning_once(f"astrobiogen attention: plain PyTorch serves calls with {why}")
        mask = attention_mask
        if mask is None:
            mask = _visible(query.shape[2], key.shape[2], causal, sliding_window, query.device)
        mask = _within(mask, bounds, query.shape[2], key.shape[2])
        mask = _biased(mask, position_bias, query.dtype)
        return _plain_attention(query, key, value, mask, dropout, scaling, softcap, s_aux), None
    out = ops.attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        causal=causal, scale=scaling, window=sliding_window, softcap=softcap, cu_seqlens=bounds, sinks=s_aux,
    )  # fmt: skip
    return out, None


def _width(module: torch.nn.Module, mask: torch.Tensor, keys: int) -> int | None:
    """The window that a mask without rows stands for."""
    if mask.shape[3] != 2 * keys + 1:
        raise ValueError(
            f"{type(module).__name__} gives the attention interface {NAME!r} {keys} keys with the mask of "
            f"{mask.shape[3] // 2}: choose another one with model.set_attn_implementation('sdpa') or 'eager'"
        )
    return mask.shape[1] - 1 or None


def _is_set(given: Any) -> bool:
    return given is not None and given is not False


def _packed(
    bounds: torch.Tensor | None, of_keys: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The bounds of the sequences packed in one row, the same for queries and keys."""
    if bounds is None and of_keys is None:
        return None
    equal = bounds is of_keys or (bounds is not None and of_keys is not None and torch.equal(bounds, of_keys))
    if not equal or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be equal, for one row of as many queries as keys, got "
            f"{query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
        )
    return bounds


def _visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool [Sq, Sk]: what queries at the end of the keys see, as `ops.attention` has it; None for everything."""
    if not causal and window is None:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def _within(mask: torch.Tensor | None, bounds: torch.Tensor | None, queries: int, keys: int) -> torch.Tensor | None:
    """`mask` less what lies in another of the packed sequences."""
    if bounds is None:
        return mask
    ends = bounds[1:].contiguous()
    places = torch.arange(keys, device=bounds.device, dtype=bounds.dtype)
    number = torch.searchsorted(ends, places, right=True)
    same = number[keys - queries :, None] == number
    if mask is None:
        return same
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def _biased(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`mask` as it is, or added up with the bias [.., Hq, Sq, Sk]."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [B, Sq, Hq, D] with a bool or additive mask; softmax in fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, dim=1) if groups > 1 else one for one in (key, value))
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        return out.transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row of padding sees nothing and stays finite
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., : key.shape[2]].to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2)
