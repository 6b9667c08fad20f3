"""Rounds that look at code, configuration, data and model; nothing is trained."""

import dataclasses
import importlib
import math
import pkgutil

import torch
from torch import nn

import astrobiogen
from astrobiogen import data
from astrobiogen.training import config as configuration
from astrobiogen.training import evaluation
from astrobiogen.training.config import as_dict, parser
from astrobiogen.training.config.model import ModelChanges
from astrobiogen.training.observe import trackers
from astrobiogen.training.optim.optimizer import build_optimizer
from astrobiogen.training.tools import fake, plan, room
from astrobiogen.training.tools.preflight.subject import PACKAGE, Subject, require

# What a run loads.
_PARTS = ("data", "kernels", "layers", "models", "system", "training")
_GIB = 2**30
# fp32 through all layers, by kernels and by plain PyTorch.
_ROUNDING = 1e-3


def syntax(_subject: Subject) -> str:
    """Every source file of the package is compiled."""
    files = sorted(PACKAGE.rglob("*.py"))
    for path in files:
        compile(path.read_bytes(), path, "exec", dont_inherit=True)
    return f"{len(files)} source files compile"


def imports(subject: Subject) -> str:
    """Every module that a run may load is, and the optional libraries that the configuration asks for."""
    count = 0
    for part in _PARTS:
        package = importlib.import_module(f"{astrobiogen.__name__}.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "triton" not in module.name:
                importlib.import_module(module.name)
                count += 1
    trackers.require(subject.config.monitor)
    build_optimizer(nn.Linear(64, 64), subject.config.optimizer)
    return f"{count} modules and what the configuration asks for: {subject.config.optimizer.name}"


def model_configuration(subject: Subject) -> str:
    """The configuration survives a file, as do all presets; the model accepts every key of it."""
    for made in (subject.config, *map(configuration.preset, configuration.PRESETS)):
        require(parser.from_dict(as_dict.to_dict(made)) == made, f"{made.preset} does not survive a round trip")
    count = sum(value.numel() for value in subject.without_memory.task.model.parameters())
    return f"{subject.config.preset}: {count:,} parameters; it and {len(configuration.PRESETS)} presets are valid"


def shapes(subject: Subject) -> str:
    """The whole model runs on its largest micro-batch, without memory, and answers in the shapes that it promises."""
    made, model = fake.Shapes(), subject.without_memory.task.model
    tensors, batch = made.of_model(model), made.of(subject.largest)
    size = len(subject.largest["metadata"])
    with evaluation.untouched(nn.Module()), made.mode, torch.no_grad():
        outputs = torch.func.functional_call(model, tensors, (batch,))
    found = {name: tuple(outputs[name].shape) for name in ("logits", "regression")}
    require(found["logits"] == (size, 2), f"logits: got {found['logits']}, expected {(size, 2)}")
    require(math.prod(found["regression"]) == size, f"regression: got {found['regression']}, expected {(size,)}")
    cube = tuple(subject.largest["climate_datacube"].shape)
    return f"climate cube {cube} and {len(found)} answers: {found}"


def batch(subject: Subject) -> str:
    """A batch has all keys, and no NaN."""
    made = subject.largest
    missing = {"modality_mask", "climate_datacube", "input_ids", "habitability_label"} - made.keys()
    require(not missing, f"no {', '.join(sorted(missing))} in the batch")
    tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    require(not bad, f"NaN or Inf in {', '.join(bad)}")
    return f"{len(made)} keys, {len(tensors)} tensors, all finite; climate cube {tuple(made['climate_datacube'].shape)}"


def memory(subject: Subject) -> str:
    """The plan fits, and what the memory optimisations of the configuration save by it."""
    config = subject.config
    count = subject.processes or room.expected_processes(config)
    planner = room.Planner(config, subject.bundle)
    made = planner(config, count)
    _, size, whose = room.allowance(config, subject.memory_gib)
    verdict = plan.judge(made, config, size)
    if not verdict.fits:
        change = room.cheapest(planner, count, size)
        advice = f"this fits: {change}" if change else "no change of settings fits"
        raise ValueError(f"{made.peak / _GIB:.1f} GiB do not fit into {whose}; {advice}")
    others = dataclasses.replace(config, model=_switched(config, not _recomputing(subject)))
    other = planner(others, count).moving
    kept, recomputed = (other, made.moving) if _recomputing(subject) else (made.moving, other)
    full = plan.optimizer_bytes(subject.without_memory.task.model, "adamw")
    own = plan.optimizer_bytes(subject.without_memory.task.model, config.optimizer.name)
    return (
        f"{verdict.text}: {made.peak / _GIB:.2f} GiB in {whose}; {config.optimizer.name} takes {own / full:.0%} of "
        f"AdamW's state; recomputing activations {'saves' if _recomputing(subject) else 'would save'} "
        f"{max(0.0, 1 - recomputed / kept):.0%} of what a micro-batch holds; {config.precision.dtype}; "
        f"{config.data.batch_size} x {config.data.accumulation} samples"
    )


def _recomputing(subject: Subject) -> bool:
    model = subject.without_memory.model_config
    return all(part.use_gradient_checkpointing for part in (model.llm_config, model.graph_config, model.cnn_config))


def _switched(config: configuration.TrainConfig, on: bool) -> ModelChanges:
    """The model's changes with recomputation on or off in all parts that have blocks."""
    names = ("llm_config", "graph_config", "cnn_config")
    parts = {name: dataclasses.replace(getattr(config.model, name), use_gradient_checkpointing=on) for name in names}
    return dataclasses.replace(config.model, **parts)


def loss(subject: Subject) -> str:
    """The terms of the loss are finite, their weighted sum is the loss, and its gradient reaches the model."""
    assembly = subject.assembly
    made, model = subject.batch(), assembly.task.model
    with evaluation.untouched(model):
        value, parts = assembly.task.loss_function(model.train()(made), made)
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    total = float(value.detach())
    reached = sum(gradient is not None for gradient in gradients)
    norm = float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))
    weighted = sum(getattr(assembly.model_config, f"{name}_weight") * float(part) for name, part in parts.items())
    require(math.isfinite(norm) and norm > 0, f"gradient norm {norm}")
    require(math.isclose(weighted, total, rel_tol=1e-4), f"loss {total}, sum of its terms {weighted}")
    return (
        f"{total:.3f} is the weighted sum of {', '.join(parts)}; gradient norm {norm:.3f}, "
        f"{reached} of {len(gradients)} parameters{subject.stands_in}"
    )


def data_parts(subject: Subject) -> str:
    """The data are there, and no star system of the cell with new planets and organisms is among those trained on."""
    bundle = subject.bundle
    store = bundle.train.store

    def systems(samples: data.HabitatDataset) -> set[str]:
        facts = [store.planets[pair.climate].metadata for pair in samples.pairs]
        return {str(item.get("star_system") or item["planet"]) for item in facts}

    sizes = f"{len(bundle.train)} training, {len(bundle.validation)} validation, {len(bundle.test)} test samples"
    cell = bundle.test_cells.get("new_both")
    if cell is None:
        return f"{sizes}; no test cell new_both"
    new = systems(cell)
    shared = new & (systems(bundle.train) | systems(bundle.validation))
    require(not shared, f"star systems in training and in the new_both test cell: {sorted(shared)}")
    return f"{sizes}; the {len(new)} star systems of new_both occur nowhere in training or validation"


@torch.no_grad()
def feature_flow(subject: Subject) -> str:
    """Every modality that the samples have changes the answer; plain PyTorch gives the same answer."""
    model, made = subject.assembly.task.model, subject.batch()
    present = dict(zip(evaluation.MODALITIES, made["modality_mask"].any(0).tolist(), strict=True))
    with evaluation.frozen(model):
        answers = {name: model(evaluation.mask_modality(made, name))["logits"] for name in present if present[name]}
        whole = model(made)["logits"]
        with astrobiogen.use_kernels("reference"):
            plain = model(made)["logits"]
    off = float((whole - plain).abs().max() / plain.abs().max())
    require(off < _ROUNDING, f"kernels and plain PyTorch differ by {off:.1e} of the largest logit")
    changes = {name: float((whole - answer).abs().max()) for name, answer in answers.items()}
    silent = [name for name in subject.assembly.model_config.modalities if name in changes and not changes[name] > 0]
    require(not silent, f"no influence on the answer: {', '.join(silent)}")
    told = ", ".join(f"{name} {change:.2g}" for name, change in changes.items())
    return f"change of the logits without each modality: {told}{subject.stands_in}"
