"""One training step of the whole model (forward, loss, backward) with fused kernels against the same step with the
plain PyTorch references.

Model `tiny`, a batch of 16 real samples as `python -m astrobiogen.train` forms it: 4 to 6 climate cubes, 5 to 7
metabolic networks, 4 of 16 texts of 192 tokens. Both candidates share the weights. Column "error": largest error of
loss and gradients against the reference in fp64: per part of the model, the norm of the difference over the norm of
the part's gradient. Not per parameter: a bias whose gradient is the rest of a sum that cancels carries the error of the
summands, which fresh weights move by ten times either way; element by element, the operators' tests compare.
"""

import copy
import functools
import math
from typing import Any

import pytest
import torch

import astrobiogen
from astrobiogen import data
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.training.batches import shared_items
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.runner import Bench

BATCH, BLOCK = 16, 5
# Allowed error against fp64: times the reference's, and a floor in units of eps.
FACTOR, FLOOR = 3.0, 8.0


@functools.cache
def workload() -> tuple[UnifiedMultiModalSystem, dict]:
    """The model and one batch."""
    bundle = data.load_bundled()
    sampler = shared_items.BlockSampler(shared_items.keys_of(bundle.train), BATCH, 0, BLOCK)
    chosen = next(iter(sampler.batches(0)))
    torch.manual_seed(0)
    system = UnifiedMultiModalSystem(presets.tiny(bundle.spec))
    return system, shared_items.collate_shared([bundle.train[index] for index in chosen], bundle.spec.pad_id)


def step(kernels: str, system: UnifiedMultiModalSystem, batch: dict) -> tuple[torch.Tensor, ...]:
    """(loss, gradients) of one step."""
    with astrobiogen.use_kernels(kernels):
        outputs = system(batch)
        loss, _ = compute_multimodal_loss(outputs, batch, system.config)
        return (loss.detach(), *torch.autograd.grad(loss, list(system.parameters())))


def widened(value: Any) -> Any:
    """`value` with its floating-point tensors in fp64: a tensor, a dict or a `torch_geometric` batch."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: widened(one) for name, one in value.items()}
    return value.clone().apply(widened) if hasattr(value, "apply") else value


def by_part(system: UnifiedMultiModalSystem, values: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The loss, and the gradients of each part of the model as one fp64 vector."""
    loss, *gradients = values
    parts: dict[str, list[torch.Tensor]] = {"loss": [loss.double().flatten()]}
    for (name, _), gradient in zip(system.named_parameters(), gradients, strict=True):
        parts.setdefault(name.partition(".")[0], []).append(gradient.double().flatten())
    return {part: torch.cat(vectors) for part, vectors in parts.items()}


def errors(system: UnifiedMultiModalSystem, batch: dict) -> dict[str, float]:
    """Largest relative error of either step against fp64, without dropout.

    Raises:
        AssertionError: ours is beyond `FACTOR` times the reference's.
    """
    system.eval()
    ours, plain = (by_part(system, step(kernels, system, batch)) for kernels in ("auto", "reference"))
    exact = by_part(system, step("reference", copy.deepcopy(system).double(), widened(batch)))
    system.train()
    floor = FLOOR * torch.finfo(torch.float32).eps
    largest = {"ours": 0.0, "eager": 0.0}
    for part, truth in exact.items():
        size = truth.norm().item()  # 0 for a part that the batch does not feed
        found = {name: (values[part] - truth).norm().item() for name, values in (("ours", ours), ("eager", plain))}
        assert found["ours"] <= FACTOR * found["eager"] + floor * size, (part, found, size)
        largest = {name: max(largest[name], error / max(size, 1e-30)) for name, error in found.items()}
    return largest


def test_train_step(bench: Bench, device: torch.device) -> None:
    """Time and most memory held of one step."""
    if device.type != "cpu":
        pytest.skip("the comparison is one of CPU kernels")
    system, batch = workload()
    error = errors(system, batch)
    calls = {
        name: functools.partial(step, kernels, system, batch)
        for name, kernels in (("ours", "auto"), ("eager", "reference"))
    }
    memory = {name: harness.added_memory(call, device) / 2**20 for name, call in calls.items()}
    times = harness.time_in_turns(calls, bench.settings, device)
    for name, sample in times.items():
        row = Row(
            "train_step", "tiny, batch 16", "float32", "step", name, "ok",
            median_us=sample.median() * 1e6,
            low_us=sample.quantile(0.2) * 1e6,
            high_us=sample.quantile(0.8) * 1e6,
            device_us=sample.processor() * 1e6 if torch.get_num_threads() == 1 else math.nan,
            against_eager=times["eager"].median() / sample.median(),
            device_against_eager=times["eager"].processor() / sample.processor(),
            added_mib=memory[name],
            error=error[name],
            rounds=len(sample.wall),
            cpu_share=sum(sample.cpu) / sum(sample.wall) / torch.get_num_threads(),
        )  # fmt: skip
        bench.record(row, sample)
        bench.add([row])
    assert memory["ours"] < memory["eager"]
