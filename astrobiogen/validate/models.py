"""Every model of the tiny preset, on real samples, with kernels against plain PyTorch; half precision by autocast."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from astrobiogen import data
from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets
from astrobiogen.testing.tolerance import Subject
from astrobiogen.validate import modules
from astrobiogen.validate.rows import Row, row

Batch = dict[str, Any]
SAMPLES = 3


def _named(names: tuple[str, ...]) -> Callable[[Mapping[str, Any]], dict[str, torch.Tensor]]:
    return lambda outputs: {name: outputs[name] for name in names}


def _system(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    outputs = model(batch)
    assert isinstance(model, UnifiedMultiModalSystem)
    loss, _ = compute_multimodal_loss(outputs, batch, model.config)
    return {"logits": outputs["logits"], "regression": outputs["regression"], "loss": loss}


def _fusion(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    features = {name: batch[f"{name} features"] for name in ("climate", "graph", "spectrum", "planet_params", "text")}
    return _named(("logits", "regression", "fused_features"))(model(features))


# Name -> (where it is in the system, "" for the system itself; what it makes of a batch).
MODELS: dict[str, tuple[str, modules.Call]] = {
    "RebuiltLLMIntegration": (
        "text",
        lambda m, b: _named(("features", "loss"))(m(b["input_ids"], b["attention_mask"], b["labels"])),
    ),
    "RebuiltGraphVAE": ("graph", lambda m, b: _named(("features", "loss"))(m(b["metabolic_graph"]))),
    "RebuiltDatacubeCNN": (
        "climate",
        lambda m, b: _named(("features", "reconstruction_loss", "physics_loss"))(
            m(b["climate_datacube"], b["climate_mask"])
        ),
    ),
    "SpectrumEncoder": ("spectrum", lambda m, b: {"features": m(b["spectroscopy"], b["spectroscopy_mask"])}),
    "PlanetParameterEncoder": (
        "planet_params",
        lambda m, b: {"features": m(b["planet_params"], b["planet_params_mask"])},
    ),
    "RebuiltMultimodalIntegration": ("fusion", _fusion),
    "UnifiedMultiModalSystem": ("", _system),
}


@functools.lru_cache(maxsize=1)
def bundle() -> data.DatasetBundle:
    """The bundled real samples."""
    return data.load_bundled()


def _pooled(tensors: modules.Tensors, exact: modules.Tensors) -> modules.Tensors:
    """Results and gradients as one vector each, every tensor in units of its own root mean square: single biases hold
    too few entries for one draw of an error to be held against another."""
    pools: dict[str, list[torch.Tensor]] = {"results": [], "gradients": []}
    for name, true in exact.items():
        size = true.double().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        pools["gradients" if name.startswith("gradient") else "results"].append(tensors[name].double() / size)
    return {name: torch.cat([one.flatten() for one in pool]) for name, pool in pools.items()}


def check(name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """Hold one model, in evaluation mode, against eager."""
    place, call = MODELS[name]
    autocast = None if dtype == torch.float32 else dtype
    found = bundle()

    def draw(seed: int) -> tuple[modules.Tensors, modules.Tensors, modules.Tensors]:
        torch.manual_seed(seed)
        system = UnifiedMultiModalSystem(presets.tiny(found.spec)).eval()
        count = len(found.train)
        samples = [found.train[(seed * SAMPLES + k) * 997 % count] for k in range(SAMPLES)]
        batch: Batch = {key: _placed(value, device) for key, value in data.collate(samples, found.spec.pad_id).items()}
        if name == "RebuiltMultimodalIntegration":
            dims = system.fusion.config.modality_dims
            batch = {f"{part} features": torch.randn(SAMPLES, size).to(device) for part, size in dims.items()}
        three = modules.three(system.get_submodule(place).to(device), batch, call, autocast)
        fused, eager, exact = (_pooled(one, three[2]) for one in three)
        return fused, eager, exact

    # In units of the tensor: one rounding of each result, and of what the compute dtype holds on the way to it.
    compared = modules.compare(Subject(name, "tiny", dtype), draw, absolute_floor=torch.finfo(dtype).eps)
    return row("model", name, dtype, *compared)


def _placed(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value
