"""The attention of a Hugging Face model, swapped through its attention interface."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from astrobiogen.integrations import hugging_face
from astrobiogen.integrations.table import Swap, SwapTable

_TOKENS = 24  # of a trial: so many that short windows and chunks of keys show
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Of the largest logit, in a trial with a few tokens; attention of another formula is off by far more.
_LIMITS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def swap_attention(model: nn.Module, table: SwapTable, chosen: Callable[[str], bool]) -> None:
    """Set the attention implementation of `model` and write a row for each attention layer."""
    layers = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not layers:
        return
    reason = _left_because(model, layers, chosen)
    if not reason:
        config: Any = model.config
        before = config._attn_implementation
        if before != hugging_face.NAME:
            reason = _try(model, before)
            if not reason:
                table.on_restore(lambda: model.set_attn_implementation(before))  # type: ignore[operator]
    for name, module in layers:
        own = "" if _uses_interface(module) else "its forward does not call the attention interface"
        told = own or reason
        table.append(Swap(name, type(module).__name__, "" if told else "ops.attention", told or _BY))


_BY = "by the attention interface"


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return type(module).__module__.startswith("transformers.models.") and (
        "Attention" in name and any(isinstance(child, nn.Linear) for child in module.children())
    )


def _uses_interface(module: nn.Module) -> bool:
    try:
        return _INTERFACE in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


def _left_because(model: nn.Module, layers: list[tuple[str, nn.Module]], chosen: Callable[[str], bool]) -> str:
    if not all(chosen(name) for name, _ in layers):  # one implementation serves the whole model
        return "not chosen"
    for name, module in layers:
        if "forward" in module.__dict__:
            return f"the forward of {name} was replaced on the instance"
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "the model has no attention interface"
    config: Any = model.config
    if config._attn_implementation == "eager" and getattr(model, "_supports_sdpa", True):  # else it is no choice
        return "the model runs eager attention"
    return ""


def _try(model: Any, before: str) -> str:
    """Set the implementation; back again, with the reason, if a few tokens give other logits."""
    expected = _logits(model)
    model.set_attn_implementation(hugging_face.register_attention())
    if expected is None:
        return ""
    try:
        got = _logits(model)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = f"a trial with a few tokens failed: {' '.join(str(error).split())[:120]}"
    else:
        limit = _LIMITS.get(expected.dtype, 0.0) * float(expected.abs().max())
        same = got is not None and float((got.double() - expected.double()).abs().max()) <= limit
        reason = "" if same else "a trial with a few tokens gave other logits"
    if reason:
        model.set_attn_implementation(before)
    return reason


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor | None:
    """Logits of two rows of tokens; None where the model has no storage, or is no model of tokens only."""
    weight = next(iter(model.parameters()), None)
    words = getattr(model.config, "vocab_size", None)
    if weight is None or weight.is_meta or getattr(model, "main_input_name", "") != "input_ids" or not words:
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(2 * _TOKENS, device=device) % words).view(2, _TOKENS)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(input_ids=ids, use_cache=False)[0]
    finally:
        for module in training:
            module.training = True
