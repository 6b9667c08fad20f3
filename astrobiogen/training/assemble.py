"""From a configuration to the data, the model and the task: the only place of `training` that knows `data` and `models`."""

import contextlib
import dataclasses
import functools
import hashlib
from typing import Any

from astrobiogen import data, models
from astrobiogen.models import presets
from astrobiogen.training import loading
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.errors import UserError
from astrobiogen.training.trainer import Task


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Everything a run is made of."""

    bundle: Any
    task: Task
    model_config: Any
    test: loading.Samples


def override(config: Any, changes: dict[str, Any], prefix: str = "model") -> Any:
    """A frozen config dataclass with `changes` (nested or with dotted keys) put in; text is read as the type of the value it replaces.

    Raises:
        UserError: unknown key or a value of the wrong type, named in full.
    """
    names = [field.name for field in dataclasses.fields(config)]
    grouped: dict[str, Any] = {}
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if rest or isinstance(value, dict):
            grouped.setdefault(first, {})
            grouped[first] |= {rest: value} if rest else value
        else:
            grouped[first] = value
    new: dict[str, Any] = {}
    for key, value in grouped.items():
        if key not in names:
            raise UserError(f"{prefix}.{key}: unknown key, expected one of {', '.join(names)}")
        old = getattr(config, key)
        new[key] = override(old, value, f"{prefix}.{key}") if isinstance(value, dict) else _typed(old, value, f"{prefix}.{key}")
    try:
        return dataclasses.replace(config, **new)
    except (TypeError, ValueError) as error:
        raise UserError(f"{prefix}: {error}") from error


def _typed(old: Any, value: Any, key: str) -> Any:
    if old is None or type(value) is type(old):
        return value
    converted = None
    with contextlib.suppress(KeyError, ValueError):
        if isinstance(old, bool):
            converted = {"true": True, "false": False}[str(value).lower()]
        elif isinstance(old, int | float | str):
            converted = type(old)(str(value))
        elif isinstance(old, tuple) and isinstance(value, list):
            converted = tuple(value)
    if converted is None:
        raise UserError(f"{key}: got {value!r}, expected {type(old).__name__}")
    return converted


def load_bundle(config: TrainConfig) -> Any:
    """The data that `config` names.

    Raises:
        UserError: missing, damaged or empty.
    """
    try:
        bundle = data.load(config.data.path) if config.data.path else data.load_bundled()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data: {' '.join(str(error).split())}", exit_code=1) from error
    if not len(bundle.train) or not len(bundle.validation):
        raise UserError(f"data: {len(bundle.train)} training and {len(bundle.validation)} validation samples, expected at least one of each")
    return bundle


def limited(samples: Any, limit: int) -> Any:
    """`samples`, or its first `limit` ones."""
    return loading.Subset(samples, limit) if limit and limit < len(samples) else samples


def fingerprint(bundle: Any, limit: int) -> str:
    """Names the data by its sizes and the hash of its specification."""
    cells = {name: len(cell) for name, cell in bundle.test_cells.items()}
    digest = hashlib.sha256(bundle.spec.to_json().encode()).hexdigest()[:12]
    return f"train {len(bundle.train)}, validation {len(bundle.validation)}, test {cells}, limit {limit}, spec {digest}"


def build_model(config: TrainConfig, spec: Any) -> tuple[Any, Any]:
    """The model of the preset with `config.model` put in, and its configuration."""
    model_config = override(getattr(presets, config.preset)(spec), config.model)
    return models.UnifiedMultiModalSystem(model_config), model_config


def assemble(config: TrainConfig, bundle: Any) -> Assembly:
    """Data, model and loss as one task. Draws the weights from the global generator: seed it before."""
    limit = config.data.limit
    model, model_config = build_model(config, bundle.spec)
    train = limited(bundle.train, limit)
    task = Task(
        model=model,
        loss_function=functools.partial(_loss, model_config),
        train=train,
        validation=limited(bundle.validation, limit),
        sampler=data.EpochSampler(len(train), config.data.batch_size, config.seed),
        collate=data.collate,
        fingerprint=fingerprint(bundle, limit),
    )
    return Assembly(bundle, task, model_config, bundle.test)


def _loss(model_config: Any, outputs: dict[str, Any], batch: loading.Batch) -> Any:
    return models.compute_multimodal_loss(outputs, batch, model_config)
