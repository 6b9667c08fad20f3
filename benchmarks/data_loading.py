"""``python -m benchmarks.data_loading``: can loading keep up with training, and does its memory stay bounded?

One run on one machine: samples per second of a training step (tiny preset, batch 16, forward, loss, backward; one
thread), then of loading alone over 10,000 samples at 0 and 2 workers with the default cache, and at 2 workers with none
(every climate decoded for every batch, as in a pack much larger than the cache), with the resident memory of this
process and its workers from the 50th batch on. Pages that processes share are counted once per process: an upper bound.
Linux only.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import multiprocessing
import platform
import sys
import time
from pathlib import Path

import torch

from astrobiogen import data
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.training.batches import loading, shared_items

BATCH, BLOCK, SAMPLES, STEPS, WARM_UP = 16, 5, 10_000, 6, 50
MIB = 2**20


def resident() -> float:
    """MiB of this process and its children."""
    pids = ["self", *(str(p.pid) for p in multiprocessing.active_children())]
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / MIB


def processor() -> str:
    """Name and number of the processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def step_rate(bundle: data.DatasetBundle, order: list[list[int]]) -> float:
    """Samples per second of training steps on one batch, the fastest of ``STEPS``."""
    torch.manual_seed(0)
    system = UnifiedMultiModalSystem(presets.tiny(bundle.spec))
    batch = shared_items.collate_shared([bundle.train[index] for index in order[0]], bundle.spec.pad_id)
    best = float("inf")
    for _ in range(STEPS):
        start = time.perf_counter()
        loss, _ = compute_multimodal_loss(system(batch), batch, system.config)
        torch.autograd.grad(loss, list(system.parameters()))
        best = min(best, time.perf_counter() - start)
    return BATCH / best


def load_rate(bundle: data.DatasetBundle, order: list[list[int]], shared: bool, workers: int) -> tuple[float, ...]:
    """Samples per second, and resident memory [MiB] after ``WARM_UP`` batches and at its highest from there on."""
    collate = functools.partial(shared_items.collate_shared if shared else data.collate, pad_id=bundle.spec.pad_id)
    seen, first, highest = 0, 0.0, 0.0
    start = time.perf_counter()
    batches = loading.load_batches(bundle.train, collate, order, torch.device("cpu"), workers)
    for number, (indices, batch) in enumerate(batches, 1):
        seen += len(indices)
        if number == WARM_UP:
            first = highest = resident()
        elif number > WARM_UP and number % 10 == 0:
            highest = max(highest, resident())
        del batch
    return seen / (time.perf_counter() - start), first, highest


def main() -> None:
    """Measure and print a Markdown table."""
    torch.set_num_threads(1)
    bundle = data.load_bundled()
    sampler = shared_items.BlockSampler(shared_items.keys_of(bundle.train), BATCH, 0, BLOCK)
    order: list[list[int]] = []
    for epoch in itertools.count():
        order += sampler.batches(epoch)
        if sum(map(len, order)) >= SAMPLES:
            break
    rate = step_rate(bundle, order)
    write = sys.stdout.write
    write(f"{datetime.date.today()}, {processor()}, torch {torch.__version__}\n\n")
    write(f"training step, tiny, batch {BATCH}: {rate:.1f} samples/s\n\n")
    write("| collate | cache MiB | workers | samples | samples/s | of the step's rate | MiB after 50 | highest MiB |\n")
    write("|---|---|---|---|---|---|---|---|\n")
    part = order[:: max(1, len(order) // 120)]
    for shared, cache, workers, chosen in (
        (True, 256, 0, order), (True, 256, 2, order), (True, 0, 2, part), (False, 256, 2, part)
    ):  # fmt: skip
        loaded = data.load(SAMPLE_FOLDER, cache_mib=cache)
        found, first, highest = load_rate(loaded, chosen, shared, workers)
        name = "distinct climates once" if shared else "one cube per sample"
        figures = f"{sum(map(len, chosen))} | {found:.0f} | {found / rate:.1f}x | {first:.0f} | {highest:.0f}"
        write(f"| {name} | {cache} | {workers} | {figures} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
