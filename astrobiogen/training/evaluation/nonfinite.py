"""Where values that are not finite come from: the weights, the inputs, or the computation between them."""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from astrobiogen.training.batches import loading
from astrobiogen.training.distributed import local_part

# How much of it a report lists, and how many samples are looked at.
_NAMED, _LOOKED_AT = 5, 16
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def faulty(tensors: Mapping[str, torch.Tensor], finite: Container[str] | None = None) -> dict[str, str]:
    """The tensors that hold NaN or Inf, each with how many of its values; of a shard this process's part counts.

    Args:
        finite: names of those that may not hold Inf; the others may. Default: none may.
    """

    def bad(name: str, value: torch.Tensor) -> torch.Tensor:
        return ~torch.isfinite(value) if finite is None or name in finite else torch.isnan(value)

    checked = {name: local_part(value.detach()) for name, value in tensors.items() if value.is_floating_point()}
    found = {name: bad(name, value) for name, value in checked.items() if bad(name, value).any()}
    return {name: f"{int(where.sum())} of {where.numel()} values" for name, where in found.items()}


def told(found: Mapping[str, str]) -> str:
    """`a (1 of 2 values), b (2 of 2 values) and 3 more`."""
    named = ", ".join(f"{name} ({text})" for name, text in list(found.items())[:_NAMED])
    return named + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def weights(model: nn.Module) -> str:
    """Which of the model's parameters hold NaN or Inf, and which of its buffers NaN, `told`; empty if none."""
    return told(faulty(model.state_dict(), {name for name, _ in model.named_parameters()}))


def _floats(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside a batch by its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    named = value.to_dict() if hasattr(value, "to_dict") else value if isinstance(value, dict) else {}
    for key, item in named.items():
        yield from _floats(item, f"{name}.{key}" if name else str(key))


def _who(batch: loading.Batch, index: int) -> str:
    """Number and names of the one sample of `batch`."""
    facts = next(iter(batch.get("metadata", [])), {})
    names = ", ".join(str(facts[key]) for key in ("planet", "epoch", "organism") if key in facts)
    return f"sample {index}" + (f" ({names})" if names else "")


def inputs(samples: loading.Samples, collate: loading.Collate, indices: Sequence[int]) -> list[str]:
    """For each of the samples `indices` (the first few of them) that holds NaN or Inf: which, and in what."""
    found = []
    for index in list(indices)[:_LOOKED_AT]:
        batch = collate([samples[index]])
        bad = faulty(dict(_floats(batch)))
        if bad:
            found.append(f"{told(bad)} of {_who(batch, index)}")
    return found


def first_module(model: nn.Module, batch: loading.Batch, autocast: Autocast = contextlib.nullcontext) -> str:
    """Name of the module whose output is the first that is not finite when `batch` is run again, in evaluation mode;
    empty if none is.
    """
    first: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _arguments: Any, output: Any) -> None:
            values = dict(_floats(output if isinstance(output, dict) else {"output": output}))
            if not first and faulty(values):
                first.append(f"{name or 'the model itself'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    training = model.training
    try:
        model.eval()
        with torch.no_grad(), autocast():
            model(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return first[0] if first else ""


def origin(
    model: nn.Module,
    samples: loading.Samples,
    collate: loading.Collate,
    indices: Sequence[int],
    autocast: Autocast | None = contextlib.nullcontext,
) -> str:
    """Where NaN or Inf in the outputs for the samples `indices` comes from, in one line.

    Args:
        autocast: context of the model's passes; None: it cannot be run by this process alone (it is sharded).
    """
    if bad := weights(model):
        return f"weights not finite: {bad}"
    if found := inputs(samples, collate, indices):
        return f"inputs not finite: {'; '.join(found[:_NAMED])}"
    if autocast is None or not indices:
        return "weights and inputs are finite"
    device = next(model.parameters()).device
    for index in list(indices)[:_LOOKED_AT]:
        place = first_module(model, loading.to_device(collate([samples[index]]), device), autocast)
        if place:
            return f"weights and inputs are finite; for sample {index} the first values that are not come from {place}"
    return "weights and inputs are finite, and so are the outputs of a second pass in evaluation mode"
