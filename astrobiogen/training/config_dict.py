"""A configuration as plain dictionaries: for YAML, JSON, checkpoints, and the comparison when a run is resumed."""

import dataclasses
from typing import Any

from astrobiogen.training.config import TrainConfig


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """`config` as nested plain dictionaries, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`.

    Raises:
        ValueError: unknown key, or a value out of range, named in full.
    """
    default = TrainConfig()
    new: dict[str, Any] = {}
    for key, value in values.items():
        if not hasattr(default, key):
            raise ValueError(f"{key}: unknown key, expected one of {', '.join(to_dict(default))}")
        group = type(getattr(default, key))
        if not dataclasses.is_dataclass(group):
            new[key] = value
            continue
        names = {field.name for field in dataclasses.fields(group)}
        if unknown := sorted(value.keys() - names):
            raise ValueError(f"{key}.{unknown[0]}: unknown key, expected one of {', '.join(sorted(names))}")
        new[key] = group(**value)
    return TrainConfig(**new)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level with dotted keys; empty dictionaries stay as values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# Keys that may change when a run is resumed, since no weight depends on them.
FREE_ON_RESUME = (
    "checkpoint.",
    "monitor.",
    "stop.",
    "evaluation.",
    "distributed.",
    "hang.",
    "spike.",
    "runtime.preempted_status",
)


def changed_on_resume(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that differ between the run's configuration and the wanted one and would change its weights: key -> (saved,
    wanted).
    """
    before, after = flatten(saved), flatten(wanted)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE_ON_RESUME)
    }
