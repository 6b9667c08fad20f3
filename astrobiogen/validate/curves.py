"""Training with kernels and with plain PyTorch, in every dtype: the tiny preset on real samples from one seed."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.training import config as training_config
from astrobiogen.training.batches import shared_items
from astrobiogen.validate.models import bundle
from astrobiogen.validate.rows import DTYPES, Row

Curves = dict[str, list[float]]  # "float32, kernels" -> loss of each update
PRESET, BATCH, BATCHES = "tiny", 8, 20
# Two runs that differ by roundings: their curves part by as much as the roundings of one of them part it from exact.
FACTOR = 3.0


def name_of(dtype: torch.dtype, kernels: bool) -> str:
    """Key of `Curves`."""
    return f"{str(dtype).removeprefix('torch.')}, {'kernels' if kernels else 'eager'}"


def curve(dtype: torch.dtype, kernels: bool, steps: int, device: torch.device) -> list[float]:
    """Loss of each update: AdamW at the preset's rate, dropout and latent sampling on, gradients clipped to norm 1, in
    fp16 scaled. All curves draw the same random numbers."""
    found = bundle()
    sampler = shared_items.BlockSampler(shared_items.keys_of(found.train), BATCH, 0, 5)
    chosen = [indices for indices, _ in zip(sampler.batches(0), range(min(BATCHES, steps)))]
    batches = [shared_items.collate_shared([found.train[i] for i in rows], found.spec.pad_id) for rows in chosen]
    torch.manual_seed(0)
    choice = "auto" if kernels else "reference"
    system = UnifiedMultiModalSystem(presets.preset(PRESET, found.spec), kernels=choice).to(device)
    settings = training_config.preset(PRESET).optimizer
    optimizer = torch.optim.AdamW(system.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    half = dtype != torch.float32
    losses: list[float] = []
    for step in range(steps):
        batch: dict[str, Any] = {
            key: value.to(device) if hasattr(value, "to") else value
            for key, value in batches[step % len(batches)].items()
        }
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype) if half else contextlib.nullcontext():
            loss, _ = compute_multimodal_loss(system(batch), batch, system.config)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def measured(steps: int, device: torch.device, tell: Callable[[str], None]) -> Curves:
    """All six curves; `tell` is told each name before its run."""
    found: Curves = {}
    for dtype in DTYPES:
        for kernels in (False, True):
            name = name_of(dtype, kernels)
            tell(name)
            found[name] = curve(dtype, kernels, steps, device)
    return found


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square difference of two curves."""
    return (torch.tensor(one) - torch.tensor(other)).square().mean().sqrt().item()


def judged(curves: Curves) -> list[Row]:
    """One row per dtype: how far the kernels' curve lies from eager's, in units of what is allowed.

    Allowed is what the dtype's own roundings do: `FACTOR` times the distance of eager's curves in bf16 and in fp16 from
    eager's in fp32, and for fp32 the smaller of the two distances.
    """
    exact = curves[name_of(torch.float32, kernels=False)]
    own = {d: apart(curves[name_of(d, kernels=False)], exact) for d in DTYPES if d != torch.float32}
    rows = []
    for dtype in DTYPES:
        eager, fused = (curves[name_of(dtype, kernels)] for kernels in (False, True))
        allowed = FACTOR * own[dtype] if dtype in own else min(own.values())
        found = apart(fused, eager)
        note = f"{eager[0]:.3f} -> {eager[-1]:.3f} eager, {fused[0]:.3f} -> {fused[-1]:.3f} kernels; {found:.1e} apart"
        failed = () if found <= allowed else (f"{note}, allowed {allowed:.1e}",)
        name = f"{PRESET}, {len(eager)} updates"
        rows.append(Row("training", name, str(dtype)[6:], len(eager), found / allowed, None, failed, note))
    return rows
