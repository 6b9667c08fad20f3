"""What a long run wants to know before it begins: named checks, each of a second or less, for `doctor --preflight`."""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from astrobiogen import data
from astrobiogen.training import config
from astrobiogen.training.batches import assemble, loading
from astrobiogen.training.checkpoint import CheckpointStore, Content, verify
from astrobiogen.training.config import as_dict, parser
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.optim import precision
from astrobiogen.training.optim.optimizer import build_optimizer

_SEED = 0


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check): a check returns what it found, or raises with what is wrong."""
    yield "presets", _presets
    yield "held-out groups", _held_out
    yield "batch", _batch
    yield "training step", lambda: _step(device, "fp32")
    yield "mixed precision step", lambda: _step(device, "fp16" if device.type == "cuda" else "bf16")
    yield "8-bit optimizer", _eight_bit
    yield "checkpoint", _checkpoint


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _presets() -> str:
    for name in config.PRESETS:
        made = config.preset(name)
        _require(parser.from_dict(as_dict.to_dict(made)) == made, f"{name} does not survive a round trip")
    return f"{', '.join(config.PRESETS)} are valid"


def _held_out() -> str:
    bundle = data.load_bundled()
    store = bundle.train.store

    def systems(samples: data.HabitatDataset) -> set[str]:
        facts = [store.planets[pair.climate].metadata for pair in samples.pairs]
        return {str(item.get("star_system") or item["planet"]) for item in facts}

    new = systems(bundle.test_cells["new_both"])
    shared = new & (systems(bundle.train) | systems(bundle.validation))
    _require(not shared, f"star systems in training and in the new_both test cell: {sorted(shared)}")
    return f"{len(new)} star systems of the new_both test cell occur nowhere in training or validation"


def _tiny() -> tuple[assemble.Assembly, config.TrainConfig]:
    settings = config.smoke(config.preset("tiny"))
    runtime.seed_everything(_SEED)
    return assemble.assemble(settings, assemble.load_bundle(settings)), settings


def _first_batch(assembly: assemble.Assembly, device: torch.device) -> loading.Batch:
    task = assembly.task
    indices = next(iter(task.sampler.batches(0)))
    return loading.to_device(task.collate([task.train[index] for index in indices]), device)


def _batch() -> str:
    assembly, _ = _tiny()
    batch = _first_batch(assembly, torch.device("cpu"))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    _require(not bad, f"NaN or Inf in {', '.join(bad)}")
    return f"{len(tensors)} tensors, all finite; climate cube {tuple(batch['climate_datacube'].shape)}"


def _step(device: torch.device, name: str) -> str:
    assembly, settings = _tiny()
    model = assembly.task.model.to(device).train()
    dtype, _ = precision.choose_dtype(config.PrecisionConfig(dtype=name), device)  # type: ignore[arg-type]
    batch = _first_batch(assembly, device)
    with precision.autocast(device, dtype):
        loss, _ = assembly.task.loss_function(model(batch), batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    _require(math.isfinite(norm) and norm > 0, f"gradient norm {norm} in {name}")
    build_optimizer(model, settings.optimizer).step()
    return f"{name} on {device.type}: loss {float(loss.detach()):.3f}, gradient norm {norm:.3f}"


def _eight_bit() -> str:
    settings = config.OptimizerConfig(name="adamw8bit")
    model = torch.nn.Linear(64, 64)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = build_optimizer(model, settings)
    optimizer.step()
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if hasattr(value, "dtype")}
    _require(torch.uint8 in kinds, f"its moments are {kinds}, expected uint8")
    return "bitsandbytes keeps AdamW's moments in 8 bits"


def _checkpoint() -> str:
    with tempfile.TemporaryDirectory() as name:
        store = CheckpointStore(Path(name), keep=2)
        content = Content({"model": {"weight": torch.randn(64, 64)}}, {"training": {"step": 1}})
        older, newer = store.save(1, content), store.save(2, content)
        verify(newer)
        path = newer / "model.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            verify(newer)
        except CheckpointError:
            found = store.load_newest()
            _require(found is not None and found[0] == older, "the damaged checkpoint was not passed over")
            return "written, verified; a flipped bit is noticed and the one before used"
    raise ValueError("a flipped bit was not noticed")
