"""From a configuration to the data, the model and the task: the only place of `training` that knows `data` and
`models`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from astrobiogen import data, models
from astrobiogen.models import presets
from astrobiogen.training.batches import augmentation, loading, shared_items
from astrobiogen.training.batches.task import Task
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.config.model import applied
from astrobiogen.training.errors import UserError

# Climates and organisms per block of an evaluation: 96 samples then hold about 10 of each, and no item costs more than
# the text.
_EVALUATION_BLOCK = 10


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Everything a run is made of."""

    bundle: data.DatasetBundle
    task: Task
    model_config: models.MultiModalTrainingConfig


def load_bundle(
    config: TrainConfig, statistics: Mapping[str, Any] | None = None, to_train: bool = True
) -> data.DatasetBundle:
    """The data that `config` names, cut to `data.limit` samples per split; with `statistics` (of a trained model), read
    by them in place of the data's own.

    Args:
        to_train: a training and a validation part are needed.

    Raises:
        UserError: missing, damaged or empty, or on other axes than `statistics`.
    """
    try:
        if config.data.path:
            bundle = data.load(config.data.path, statistics=statistics)
        else:
            bundle = data.load_bundled()
            if statistics is not None and bundle.statistics() != statistics:  # trained with another version's
                bundle = data.load(data.SAMPLE_FOLDER, statistics=statistics)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data: {' '.join(str(error).split())}", exit_code=1) from error
    limit = config.data.limit
    if limit:
        cells = {name: limited(cell, -(-limit // len(bundle.test_cells))) for name, cell in bundle.test_cells.items()}
        bundle = dataclasses.replace(
            bundle, train=limited(bundle.train, limit), validation=limited(bundle.validation, limit), test_cells=cells
        )
    if to_train and not (len(bundle.train) and len(bundle.validation)):
        raise UserError(
            f"data: {len(bundle.train)} training and {len(bundle.validation)} validation samples, "
            "expected at least one of each"
        )
    return bundle


def every_pair(bundle: data.DatasetBundle) -> data.DatasetBundle:
    """`bundle` with all its pairs to be tested, those of its training and validation part as cells of their own."""
    parts = {samples.name: samples for samples in (bundle.train, bundle.validation) if len(samples)}
    return dataclasses.replace(bundle, test_cells=parts | bundle.test_cells)


def limited(samples: data.HabitatDataset, limit: int) -> data.HabitatDataset:
    """At most `limit` of `samples`, spread evenly over the set (neighbours share a planet)."""
    if limit >= len(samples):
        return samples
    return data.HabitatDataset(
        samples.store, [samples.pairs[number] for number in spread(len(samples), limit)], samples.name
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 .. count - 1, evenly spread."""
    return list(range(count)) if limit >= count else [number * count // limit for number in range(limit)]


def fingerprint(bundle: data.DatasetBundle) -> str:
    """Names the data by its sizes and the digest of its content."""
    cells = ", ".join(f"{len(cell)} {name}" for name, cell in bundle.test_cells.items())
    sizes = f"train {len(bundle.train)}, validation {len(bundle.validation)}, test {len(bundle.test)} ({cells})"
    return f"{sizes}, content {data.content_digest(bundle)[:16]}"


def build_model(
    config: TrainConfig, spec: data.DataSpec
) -> tuple[models.UnifiedMultiModalSystem, models.MultiModalTrainingConfig]:
    """The model of the preset with `config.model` put in, and its configuration.

    Raises:
        UserError: a value of `config.model` is out of range, or does not fit the others.
    """
    try:
        model_config = applied(presets.preset(config.preset, spec), config.model)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    return models.UnifiedMultiModalSystem(model_config), model_config


def assemble(config: TrainConfig, bundle: data.DatasetBundle, device: str = "cpu") -> Assembly:
    """Data, model and loss as one task. Draws the weights, on `device`, from the global generator: seed it before."""
    with torch.device(device):
        model, model_config = build_model(config, bundle.spec)
    settings, pad_id = config.data, bundle.spec.pad_id
    if model_config.use_network_summary and "graph" in model_config.modalities and len(bundle.train):
        model.remember_networks(shared_items.distinct_networks(bundle.train, pad_id))
    sampler: loading.Sampler
    if settings.block or not len(bundle.train):
        sampler = shared_items.BlockSampler(
            shared_items.keys_of(bundle.train), settings.batch_size, config.seed, max(settings.block, 1)
        )
    else:
        sampler = data.EpochSampler(len(bundle.train), settings.batch_size, config.seed)
    task = Task(
        model=model,
        loss_function=functools.partial(_loss, model_config),
        train=bundle.train,
        validation=bundle.validation,
        sampler=sampler,
        collate=functools.partial(shared_items.collate_shared if settings.block else data.collate, pad_id=pad_id),
        fingerprint=fingerprint(bundle),
        statistics=bundle.statistics(),
        validation_order=evaluation_order(bundle.validation, config),
        counts=TermCounts(bundle.train),
        validation_counts=TermCounts(bundle.validation),
        text_share=model_config.text_share,
        every_parameter=True,  # the collate functions put an empty item in the place of an absent one
        augment=augmentation.roll_longitude if settings.roll_longitude else None,
    )
    return Assembly(bundle, task, model_config)


def evaluation_order(samples: data.HabitatDataset, config: TrainConfig) -> list[list[int]] | None:
    """Batches in which climates and graphs repeat, if the task shares them; None: consecutive ones."""
    if not config.data.block or not len(samples):
        return None
    return shared_items.in_blocks(samples, config.evaluation.batch_size, _EVALUATION_BLOCK)


class TermCounts:
    """How many things each term of the loss is a mean over, where that is not the number of samples: see
    `weighting.Counts`. Each sample is looked at once.
    """

    def __init__(self, samples: data.HabitatDataset) -> None:
        self._samples = samples
        self._known: dict[int, tuple[bool, bool, int]] = {}

    def __call__(self, indices: Sequence[int], read: frozenset[int] | None = None) -> dict[str, float]:
        """Counts of the batch `indices`, of which the texts of `read` (None: all) are read."""
        found = [self._of(index) for index in indices]
        climates = float(sum(climate for climate, _, _ in found))
        tokens = sum(tokens for index, (_, _, tokens) in zip(indices, found) if read is None or index in read)
        graphs = sum(graph for _, graph, _ in found)
        return {"reconstruction": climates, "physics": climates, "graph": float(graphs), "llm": float(tokens)}

    def _of(self, index: int) -> tuple[bool, bool, int]:
        """Whether sample `index` has a climate, has a graph, and its predicted tokens (all but the first)."""
        if index not in self._known:
            sample = self._samples[index]
            tokens = max(sample.input_ids.numel() - 1, 0)
            self._known[index] = sample.has_climate, sample.graph is not None, tokens
        return self._known[index]


def _loss(
    model_config: models.MultiModalTrainingConfig,
    outputs: dict[str, Any],
    batch: loading.Batch,
    emphasis: dict[str, float] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    factors = emphasis or {}
    weights = {f"{name}_weight": getattr(model_config, f"{name}_weight") * factor for name, factor in factors.items()}
    loss, parts = models.compute_multimodal_loss(outputs, batch, dataclasses.replace(model_config, **weights))
    return loss, {name: value * factors.get(name, 1.0) for name, value in parts.items() if name != "total"}
