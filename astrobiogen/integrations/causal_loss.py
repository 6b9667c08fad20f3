"""The loss of a Hugging Face causal language model without its logits."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.integrations.lazy_logits import LazyHead, LazyLogits
from astrobiogen.integrations.table import Swap, SwapTable

_TOKENS = 6  # of a trial
_LIMIT = 2e-2  # of the loss; half-precision logits are rounded by one of the two only


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Mean cross-entropy of the next token, or the sum over `num_items_in_batch`, as `ForCausalLMLoss` of transformers.

    Of `LazyLogits` [..., V] the logits are never made (`ops.linear_cross_entropy`); of others transformers' own
    function is called.

    Args:
        logits: [B, S, V].
        labels: int64 [B, S], the tokens themselves; `ignore_index` where none counts.
        vocab_size: V.
        num_items_in_batch: tokens of all micro-batches.
        ignore_index: label of what does not count.
        shift_labels: labels that are shifted already; `labels` is then not read.
        options: taken as transformers takes them.
    """
    if not isinstance(logits, LazyLogits) or vocab_size != logits.shape[-1]:
        own = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
        return own(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.to(logits.hidden.device).reshape(logits.hidden.shape[:-1])
    with torch.autocast(logits.hidden.device.type, enabled=False):
        x, weight = logits.hidden.to(logits.product), logits.weight.to(logits.product)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = ops.linear_cross_entropy(x, weight, target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    count = num_items_in_batch
    return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)


def swap_loss(model: Any, table: SwapTable, chosen: bool, left_because: Any) -> None:
    """Put a `LazyHead` and `causal_loss` into a causal language model of transformers, and write a row.

    Args:
        model: any module.
        table: gets the row, and the way back.
        chosen: whether the caller wants it.
        left_because: tells of a module why it is more than its class, or "".
    """
    found = _output_layer(model)
    if found is None:
        return
    name, head = found
    reason = "not chosen" if not chosen else left_because(head)
    if not reason and (type(head) is not nn.Linear or head.bias is not None):
        reason = f"the output layer is a {type(head).__name__}" + (" with a bias" if head.bias is not None else "")
    if not reason:
        before, expected = model.__dict__.get("_loss_function"), _loss(model)

        def undo() -> None:
            if type(head) is LazyHead:
                _turn(head, nn.Linear)
            model.__dict__.pop("_loss_function", None)
            if before is not None:
                model._loss_function = before

        _turn(head, LazyHead)  # the same object: others hold it, by its name or by its weight
        model.loss_function = causal_loss
        got = _loss(model)
        if expected is not None and (got is None or not abs(got - expected) <= _LIMIT * abs(expected)):
            undo()
            reason = "a trial with a few tokens gave another loss"
        else:
            table.on_restore(undo)
    table.append(Swap(f"{name} and loss", nn.Linear.__name__, "" if reason else "LazyHead", reason or _BY))


_BY = "the loss is computed without the logits, which are made when they are asked for"


def _turn(module: Any, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _output_layer(model: Any) -> tuple[str, Any] | None:
    """Name and module of the output layer of a model with the loss of causal language models."""
    if not type(model).__module__.startswith("transformers.models.") or not hasattr(model, "loss_function"):
        return None
    own = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    head = model.get_output_embeddings()
    if model.loss_function is not own or head is None:
        return None
    return next(((name, module) for name, module in model.named_modules() if module is head), None)


@torch.no_grad()
def _loss(model: Any) -> float | None:
    """Loss of a few tokens; None where the model has no storage or no loss of tokens alone."""
    weight = next(iter(model.parameters()), None)
    if weight is None or weight.is_meta or getattr(model, "main_input_name", "") != "input_ids":
        return None
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(2 * _TOKENS, device=device) % model.get_output_embeddings().weight.shape[0]).view(2, _TOKENS)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        for module in training:
            module.training = True
