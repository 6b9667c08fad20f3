"""One training step of the whole model (forward, loss, backward) with fused kernels against the same step with the
plain PyTorch references.

Model `tiny`, a batch of 16 real samples as `python -m astrobiogen.train` forms it: 4 to 6 climate cubes, 5 to 7
metabolic networks, 16 texts of 192 tokens. Both candidates share the weights. Column "error": largest difference of
loss and gradients from the reference's, each relative to the largest entry of the reference's gradient.
"""

import functools
import math

import pytest
import torch

import astrobiogen
from astrobiogen import data
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.training import blocks
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.runner import Bench

BATCH, BLOCK = 16, 5
# Kernels differ from the reference by rounding: fp32 sums of up to 16 x 192 x 4096 terms.
LARGEST_DIFFERENCE = 2e-4


@functools.cache
def workload() -> tuple[UnifiedMultiModalSystem, dict]:
    """The model and one batch."""
    bundle = data.load_bundled()
    sampler = blocks.BlockSampler(blocks.keys_of(bundle.train), BATCH, 0, BLOCK)
    chosen = next(iter(sampler.batches(0)))
    torch.manual_seed(0)
    system = UnifiedMultiModalSystem(presets.tiny(bundle.spec))
    return system, blocks.collate_shared([bundle.train[index] for index in chosen], bundle.spec.pad_id)


def step(kernels: str, system: UnifiedMultiModalSystem, batch: dict) -> tuple[torch.Tensor, ...]:
    """(loss, gradients) of one step."""
    with astrobiogen.use_kernels(kernels):
        outputs = system(batch)
        loss, _ = compute_multimodal_loss(outputs, batch, system.config)
        return (loss.detach(), *torch.autograd.grad(loss, list(system.parameters())))


def difference(system: UnifiedMultiModalSystem, batch: dict) -> float:
    """Largest relative difference between the two steps, without dropout."""
    system.eval()
    ours, plain = (step(kernels, system, batch) for kernels in ("auto", "reference"))
    system.train()
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(ours, plain))


def test_train_step(bench: Bench, device: torch.device) -> None:
    """Time and most memory held of one step."""
    if device.type != "cpu":
        pytest.skip("the comparison is one of CPU kernels")
    system, batch = workload()
    error = difference(system, batch)
    assert error < LARGEST_DIFFERENCE
    calls = {
        name: functools.partial(step, kernels, system, batch)
        for name, kernels in (("ours", "auto"), ("eager", "reference"))
    }
    memory = {name: harness.added_memory(call, device) / 2**20 for name, call in calls.items()}
    times = harness.time_in_turns(calls, bench.settings, device)
    for name, sample in times.items():
        bench.rows.append(
            Row(
                "train_step", "tiny, batch 16", "float32", "step", name, "ok",
                median_us=sample.median() * 1e6,
                low_us=sample.quantile(0.2) * 1e6,
                high_us=sample.quantile(0.8) * 1e6,
                device_us=sample.processor() * 1e6 if torch.get_num_threads() == 1 else math.nan,
                against_eager=times["eager"].median() / sample.median(),
                device_against_eager=times["eager"].processor() / sample.processor(),
                added_mib=memory[name],
                error=error if name == "ours" else 0.0,
                rounds=len(sample.wall),
                cpu_share=sum(sample.cpu) / sum(sample.wall) / torch.get_num_threads(),
            )
        )  # fmt: skip
    assert memory["ours"] < memory["eager"]
