"""Running a model over a data set without gradients: predictions, the loss of training, modality weights, and each
modality masked."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from astrobiogen.training.batches import loading, weighting
from astrobiogen.training.distributed import World, runtime
from astrobiogen.training.distributed.share import shared_order
from astrobiogen.training.errors import NumericalError
from astrobiogen.training.evaluation import metrics, nonfinite
from astrobiogen.training.optim import precision
from astrobiogen.training.types import LossFunction

_LOG = logging.getLogger("astrobiogen")
# Between two lines that tell how far a long pass is.
_TELL_SECONDS = 15.0
MODALITIES = ("climate", "graph", "spectrum", "text", "planet_params")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass over a data set gave.

    Attributes:
        predictions: of the class, with groups.
        fraction, fraction_label: predicted and true habitable area-time fraction [n].
        loss: the total loss of all samples as one batch, by the same function as in training.
        parts: the same for each term.
        modality_weights: mean fusion weight of each modality; empty if the model gives none.
    """

    predictions: metrics.Predictions
    fraction: metrics.Floats
    fraction_label: metrics.Floats
    loss: float
    parts: dict[str, float]
    modality_weights: dict[str, float]

    def figure(self, name: str) -> float:
        """A figure by the name that `stop.metric` uses: `loss`, `class_loss`, `auroc` or `accuracy`."""
        if name == "loss":
            return self.loss
        return float(metrics.figures(self.predictions)["loss" if name == "class_loss" else name][0])

    def summary(self) -> dict[str, Any]:
        """The figures that a log record holds."""
        figures = {name: float(value[0]) for name, value in metrics.figures(self.predictions).items()}
        figures["class_loss"] = figures.pop("loss")
        error = self.fraction - self.fraction_label
        return {
            "loss": self.loss,
            **figures,
            "fraction_rmse": float(np.sqrt(np.mean(error**2))),
            "parts": self.parts,
            "modality_weights": self.modality_weights,
        }


def mask_modality(batch: loading.Batch, name: str) -> loading.Batch:
    """`batch` as if modality `name` had not been observed: its masks false, its values zero, its language-model labels
    ignored.
    """
    masked = dict(batch)
    masked["modality_mask"] = batch["modality_mask"].clone()
    masked["modality_mask"][:, MODALITIES.index(name)] = False
    absent = {
        "climate": ("climate_mask", "climate_datacube"),
        "graph": ("graph_mask",),
        "spectrum": ("spectroscopy_mask", "spectroscopy"),
        "text": ("attention_mask",),
        "planet_params": ("planet_params_mask", "planet_params"),
    }[name]
    for key in absent:
        masked[key] = torch.zeros_like(batch[key])
    if name == "text":
        masked["labels"] = torch.full_like(batch["labels"], -100)
    return masked


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the mode, the buffers and every random generator are as before, so that a pass made inside does not
    change training.
    """
    training, state = model.training, runtime.rng_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.train(training)
        runtime.set_rng_state(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """`untouched`, in evaluation mode."""
    with untouched(model):
        model.eval()
        yield


@dataclasses.dataclass
class _Collected:
    indices: list[int] = dataclasses.field(default_factory=list)
    probability: list[torch.Tensor] = dataclasses.field(default_factory=list)
    label: list[torch.Tensor] = dataclasses.field(default_factory=list)
    fraction: list[torch.Tensor] = dataclasses.field(default_factory=list)
    fraction_label: list[torch.Tensor] = dataclasses.field(default_factory=list)
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)
    metadata: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    suspects: list[int] = dataclasses.field(default_factory=list)

    def add(
        self,
        indices: list[int],
        outputs: dict[str, Any],
        batch: loading.Batch,
        loss: torch.Tensor,
        parts: dict[str, torch.Tensor],
    ) -> None:
        size = len(indices)
        self.indices.extend(indices)
        self.probability.append(outputs["logits"].double().softmax(-1)[:, 1].cpu())
        self.label.append(batch["habitability_label"].cpu())
        self.fraction.append(outputs["regression"].double().reshape(-1).cpu())
        self.fraction_label.append(batch["habitability_fraction"].double().cpu())
        if outputs.get("modality_weights") is not None:
            self.weights.append(outputs["modality_weights"].double().cpu())
        self.metadata.extend(batch["metadata"])
        means = {name: float(value) for name, value in {"loss": loss, **parts}.items()}
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * size
        if not all(math.isfinite(mean) for mean in means.values()):
            self.suspects.extend(indices)

    @classmethod
    def merged(cls, parts: Sequence["_Collected"]) -> "_Collected":
        """All of `parts` together."""
        whole = cls()
        for part in parts:
            for field in dataclasses.fields(cls):
                if field.name != "sums":
                    getattr(whole, field.name).extend(getattr(part, field.name))
            for name, value in part.sums.items():
                whole.sums[name] = whole.sums.get(name, 0.0) + value
        return whole

    def finish(self) -> Evaluation:
        count = max(len(self.metadata), 1)
        means = {name: value / count for name, value in self.sums.items()}
        weights = torch.cat(self.weights).mean(0).tolist() if self.weights else []
        place = np.argsort(self.indices, kind="stable")
        metadata = [self.metadata[number] for number in place]
        return Evaluation(
            predictions=predictions_of(
                torch.cat(self.probability).numpy()[place], torch.cat(self.label).numpy()[place], metadata
            ),
            fraction=torch.cat(self.fraction).numpy()[place],
            fraction_label=torch.cat(self.fraction_label).numpy()[place],
            loss=means.pop("loss"),
            parts=means,
            modality_weights=dict(zip(MODALITIES, weights, strict=True)) if weights else {},
        )


def predictions_of(
    probability: metrics.Floats, label: metrics.Integers, metadata: list[dict[str, Any]]
) -> metrics.Predictions:
    """Predictions with the groups that the metadata name. Planets of one star system count as one group, as do models
    of one species."""

    def numbers(key: str, fallback: str) -> metrics.Integers:
        names = [str(item.get(key) or item.get(fallback)) for item in metadata]
        return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64)

    cells = tuple(str(item.get("cell", "")) for item in metadata)
    return metrics.Predictions(
        np.asarray(probability, np.float64),
        np.asarray(label, np.int64),
        numbers("star_system", "planet"),
        numbers("species", "organism"),
        cells,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss_function: LossFunction,
    samples: loading.Samples,
    collate: loading.Collate,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    masked: str = "",
    order: Sequence[list[int]] | None = None,
    counts: weighting.Counts | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
    what: str = "evaluation",
) -> Evaluation | None:
    """Run `model` over all of `samples`; the result is in their order.

    Args:
        order: the batches, each sample once; default: consecutive ones of `batch_size`.
        dtype: format of the forward pass.
        masked: name of a modality to hide, or empty.
        counts: how many things each term of the loss is a mean over, as `Task.counts`; the loss then is that of all
            samples in one batch. Default: every term is a mean over samples.
        should_stop: polled before each batch; True in any process ends the pass.
        world: the processes that share the batches; each gets the whole result. Default: this one alone.
        what: this pass, for messages.

    Returns:
        the evaluation, or None if it was stopped.

    Raises:
        ValueError: no samples.
        NumericalError: a prediction or the loss is NaN or Inf; says where that comes from.
    """
    if not len(samples):
        raise ValueError("samples: got an empty data set, expected at least one sample")
    collected = _Collected()
    world = world or World()
    batches = loading.in_order(len(samples), batch_size) if order is None else order
    shares = shared_order(batches, world.rank, world.size)
    size = len(samples)
    totals = {} if counts is None else counts(range(size), None)
    told = time.monotonic()
    with frozen(model):
        loaded = loading.load_batches(samples, collate, [indices for indices, _ in shares], device)
        for number, ((_, own), (indices, batch)) in enumerate(zip(shares, loaded, strict=True)):
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                _LOG.info("evaluated %d of %d batches", number, len(shares))
            if world.any(should_stop()):
                return None
            shown = mask_modality(batch, masked) if masked else batch
            factors = [] if counts is None else [weighting.emphasis(counts(indices, None), len(indices), totals, size)]
            with precision.autocast(device, dtype):
                outputs = model(shown)
                loss, parts = loss_function(outputs, shown, *factors)
            if own:
                collected.add(indices, outputs, shown, loss, parts)
        whole = _Collected.merged(world.gather(collected))
        result = whole.finish()
        alone = None if world.distributed else functools.partial(precision.autocast, device, dtype)
        find = functools.partial(nonfinite.origin, model, samples, collate, autocast=alone)
        _require_finite(what, result, whole.suspects, find)
    return result


def _require_finite(
    what: str, result: Evaluation, suspects: Sequence[int], find: Callable[[Sequence[int]], str]
) -> None:
    """Raises NumericalError if anything in `result` is NaN or Inf.

    Args:
        suspects: samples of the batches whose loss is not finite.
        find: where that comes from, given some samples.
    """
    good = np.isfinite(result.predictions.probability) & np.isfinite(result.fraction)
    terms = {"loss": result.loss, **result.parts}
    wrong = {name: str(value) for name, value in terms.items() if not math.isfinite(value)}
    bad = np.flatnonzero(~good).tolist()
    if not bad and not wrong:
        return
    origin = find(bad or sorted(suspects))
    found = [f"predictions for {len(bad)} of {len(good)} samples are NaN or Inf"] if bad else []
    found += [f"terms not finite: {', '.join(wrong)}"] if wrong else []
    details = {"pass": what, "samples": bad or sorted(suspects), "terms": wrong, "origin": origin}
    raise NumericalError(f"{what}: {'; '.join(found)}; {origin}", not_finite=details)
