"""Fused and reference kernels in the whole system: same state dict, same logits, loss and gradients within the error
rule.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from astrobiogen.models import MultiModalTrainingConfig, UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.testing import tolerance
from astrobiogen.testing.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR

Quiet = Callable[[MultiModalTrainingConfig], MultiModalTrainingConfig]
MakeBatch = Callable[..., dict[str, Any]]
# One or two draws of an error cannot be held against one or two others (that of a single bias was 5 times eager's in
# fp32 where no gradient with 8 entries or more passed 0.7 of what is allowed): such gradients are pooled.
FEW = 8
# Beyond the rule, in units of the compute dtype's eps: one rounding of the gradient itself, and the roundings of
# probabilities of order one that cancel in it, times the consistency term's share of a modality (0.15 / 5).
ROUNDINGS, CANCELLED = 1.0, 0.03


def in_double(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every real tensor in fp64."""
    changed = dict(batch)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            changed[key] = value.double()
    graph = batch["metabolic_graph"].clone()
    for name, value in graph.to_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(graph, name, value.double())
    return changed | {"metabolic_graph": graph}


def results(
    system: UnifiedMultiModalSystem, batch: dict[str, Any], autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of one step in evaluation mode."""
    system.eval()
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        outputs = system(batch)
        loss, _ = compute_multimodal_loss(outputs, batch, system.config)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in system.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"logits": outputs["logits"].detach(), "loss": loss.detach(), **gradients}  # pyright: ignore[reportReturnType]


def floor_of(truth: torch.Tensor) -> float:
    """What is allowed beyond the rule, in units of the compute dtype's eps."""
    return ROUNDINGS * truth.abs().max().item() + CANCELLED


def pooled(quantities: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients with few entries as one vector, each in units of its own floor; the others as they are."""
    few = [name for name, value in truth.items() if value.numel() < FEW and name not in ("logits", "loss")]
    rows = [(quantities[name].to(truth[name].dtype) / floor_of(truth[name])).flatten() for name in few]
    rest = {name: value for name, value in quantities.items() if name not in few}
    return rest | {"gradients with few entries": torch.cat(rows).to(quantities["loss"].dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_fused_and_reference_kernels_agree(
    make_spec: Callable[..., Any], make_batch: MakeBatch, quiet: Quiet, name: str, dtype: torch.dtype
) -> None:
    spec = make_spec(tokens=8)
    batch = make_batch(2, spec, wavelengths=10)
    config = quiet(presets.preset(name, spec))
    fused, plain = UnifiedMultiModalSystem(config), UnifiedMultiModalSystem(config, kernels="reference")
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    exact = results(copy.deepcopy(plain).double(), in_double(batch))
    autocast = None if dtype == torch.float32 else dtype
    ours, eager = results(fused, batch, autocast), results(plain, batch, autocast)
    ours, eager = pooled(ours, exact), pooled(eager, exact)
    subject = tolerance.Subject("system", name, dtype)
    for quantity, truth in pooled(exact, exact).items():
        tolerance.compare(
            subject, quantity, ours[quantity], eager[quantity], truth,
            factor=FORWARD_FACTOR if quantity in ("logits", "loss") else GRADIENT_FACTOR,
            absolute_floor=torch.finfo(dtype).eps * (1.0 if "few entries" in quantity else floor_of(truth)),
        )  # fmt: skip
