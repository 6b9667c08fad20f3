"""Bytes kept for the backward pass, and processor time of a step, with and without activation checkpointing.

    python -m benchmarks.checkpointing --preset small --batch 2 --tokens 64

Real samples in the trainer's batches, evaluation mode, every part's blocks recomputed. The two take turns; each time is
the least of `--rounds`. Exits with 1 unless loss and gradients are the same bits.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import torch

from astrobiogen import data
from astrobiogen.models import MultiModalTrainingConfig, UnifiedMultiModalSystem, compute_multimodal_loss, presets
from benchmarks.training_curve import batches_of

PARTS = ("llm_config", "graph_config", "cnn_config")


def with_checkpointing(config: MultiModalTrainingConfig, enabled: bool) -> MultiModalTrainingConfig:
    """`config` with the switch of every part that has blocks."""
    parts = {n: dataclasses.replace(getattr(config, n), use_gradient_checkpointing=enabled) for n in PARTS}
    return dataclasses.replace(config, **parts)


def kept_bytes(system: UnifiedMultiModalSystem, batch: dict[str, Any]) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and their views left out."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        root = tensor if tensor._base is None else tensor._base
        if not isinstance(root, torch.nn.Parameter) and not tensor.is_leaf:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = compute_multimodal_loss(system(batch), batch, system.config)
    del loss  # kept until here: a storage that is freed early would give its address to another
    return sum(held.values())


def step(system: UnifiedMultiModalSystem, batch: dict[str, Any]) -> tuple[float, tuple[torch.Tensor, ...]]:
    """(seconds of processor time, loss and gradients)."""
    start = time.process_time()
    loss, _ = compute_multimodal_loss(system(batch), batch, system.config)
    gradients = torch.autograd.grad(loss, list(system.parameters()))
    return time.process_time() - start, (loss.detach(), *gradients)


def main() -> int:
    """Measure and print two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=("tiny", "small"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="texts are cut to this length")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bundle = data.load_bundled()
    (batch,) = batches_of(bundle, options.batch, options.tokens, 1)
    systems: dict[str, UnifiedMultiModalSystem] = {}
    for name in ("kept", "recomputed"):
        torch.manual_seed(0)
        config = with_checkpointing(presets.preset(options.preset, bundle.spec), name == "recomputed")
        systems[name] = UnifiedMultiModalSystem(config).eval()
    held = {name: kept_bytes(system, batch) for name, system in systems.items()}
    runs = [{name: step(system, batch) for name, system in systems.items()} for _ in range(options.rounds)]
    best = {name: min(run[name][0] for run in runs) for name in systems}
    same = all(torch.equal(one, other) for one, other in zip(runs[0]["kept"][1], runs[0]["recomputed"][1]))
    for name in systems:
        sys.stdout.write(f"{options.preset}, {name}: {held[name] / 1e6:.1f} MB, {best[name] * 1e3:.0f} ms\n")
    fewer, slower = 1 - held["recomputed"] / held["kept"], best["recomputed"] / best["kept"]
    sys.stdout.write(f"{fewer:.0%} fewer bytes, {slower:.2f} times the time, same bits: {same}\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
