"""Loss over the first updates with fused and with reference kernels, beside the spread over seeds.

    python -m benchmarks.training_curve --preset tiny --output docs/models

Real samples in the trainer's batches, AdamW at the preset's rate, dropout and latent sampling on. A fused run draws the
same random numbers as the reference run of its seed, so their difference is rounding and what training makes of it.
Writes `curve_<preset>.png` and `curve_<preset>.csv`; exits with 1 unless the largest difference is below a tenth of
the mean standard deviation over seeds.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from astrobiogen import data
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.training import config as training_config
from astrobiogen.training.batches import shared_items


def batches_of(bundle: data.DatasetBundle, size: int, tokens: int, count: int) -> list[dict[str, Any]]:
    """The trainer's first `count` batches, texts cut to `tokens`."""
    sampler = shared_items.BlockSampler(shared_items.keys_of(bundle.train), size, 0, 5)
    chosen = [indices for indices, _ in zip(sampler.batches(0), range(count))]
    found = [shared_items.collate_shared([bundle.train[i] for i in indices], bundle.spec.pad_id) for indices in chosen]
    return [
        batch | {name: batch[name][:, :tokens] for name in ("input_ids", "attention_mask", "labels")} for batch in found
    ]


def curve(
    preset: str, spec: data.DataSpec, batches: list[dict[str, Any]], kernels: str, seed: int, steps: int
) -> list[float]:
    """Loss of each update of one run."""
    torch.manual_seed(seed)
    system = UnifiedMultiModalSystem(presets.preset(preset, spec), kernels=kernels)
    settings = training_config.preset(preset).optimizer
    optimizer = torch.optim.AdamW(system.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        loss, _ = compute_multimodal_loss(system(batch), batch, system.config)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sys.stdout.write(f"{preset}, {kernels}, seed {seed}: {losses[0]:.3f} -> {losses[-1]:.3f}\n")
    sys.stdout.flush()
    return losses


def draw(path: Path, reference: torch.Tensor, fused: torch.Tensor, title: str) -> None:
    """Curves above, differences and the spread below."""
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 2))
    for seed, values in enumerate(reference):
        top.plot(values, color=f"C{seed}", linewidth=3, alpha=0.4, label=f"reference, seed {seed}")
    for seed, values in enumerate(fused):
        top.plot(values, color=f"C{seed}", linewidth=1, linestyle="--", label=f"fused, seed {seed}")
        bottom.semilogy((values - reference[seed]).abs().clamp(min=1e-8), color=f"C{seed}")
    spread = reference.std(0)
    bottom.semilogy(spread, color="black", label="standard deviation over seeds")
    bottom.axhline(0.1 * spread.mean(), color="black", linestyle=":", label="a tenth of its mean")
    top.set_ylabel("training loss")
    bottom.set_ylabel("|fused - reference|")
    bottom.set_xlabel("update")
    top.set_title(title)
    top.legend(fontsize=8)
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run, draw, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=list(presets.PRESETS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3, help="reference runs")
    parser.add_argument("--fused-seeds", type=int, default=1, help="how many of the seeds also run fused")
    parser.add_argument("--batch", type=int, default=16, help="samples per update")
    parser.add_argument("--tokens", type=int, default=192, help="cut texts to this")
    parser.add_argument("--output", type=Path, default=Path("docs/models"))
    arguments = parser.parse_args()
    matplotlib.use("agg")
    bundle = data.load_bundled()
    batches = batches_of(bundle, arguments.batch, arguments.tokens, 10)

    def runs(kernels: str, count: int) -> torch.Tensor:
        return torch.tensor(
            [curve(arguments.preset, bundle.spec, batches, kernels, seed, arguments.steps) for seed in range(count)]
        )

    reference, fused = runs("reference", arguments.seeds), runs("auto", arguments.fused_seeds)
    difference, spread = (fused - reference[: len(fused)]).abs().max().item(), reference.std(0).mean().item()
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"curve_{arguments.preset}"
    draw(arguments.output / f"{name}.png", reference, fused, f"{arguments.preset}, batch {arguments.batch}, fp32")
    with (arguments.output / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [f"reference seed {seed}" for seed in range(len(reference))]
        writer.writerow(["update", *names, *(f"fused seed {seed}" for seed in range(len(fused)))])
        writer.writerows([step, *row] for step, row in enumerate(torch.cat([reference, fused]).t().tolist()))
    sys.stdout.write(
        f"largest difference {difference:.2e}, mean deviation over seeds {spread:.2e}, "
        f"ratio {difference / spread:.1e}\n"
    )
    return int(not difference < 0.1 * spread)


if __name__ == "__main__":
    sys.exit(main())
