"""A configuration as plain dictionaries: for YAML, JSON, checkpoints, and the comparison when a run is resumed."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from astrobiogen.training.config import resume_rules
from astrobiogen.training.config.model import asked
from astrobiogen.training.config.schema import TrainConfig


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """`config` as nested plain dictionaries, ready for JSON or YAML; of the model what is changed."""
    values = dataclasses.asdict(config)
    return json.loads(json.dumps(values | {"model": asked(values["model"])}))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level with dotted keys; empty dictionaries stay as values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys, dotted, that differ between two configurations as dictionaries: key -> (in `one`, in `other`). A key that
    one of them lacks has its default there, so that a configuration written before the key existed stays the same.
    """
    default = _plain(flatten(to_dict(TrainConfig())))
    before, after = (_plain(default | flatten(values)) for values in (one, other))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; without the empty dictionary that stands for no change of the model."""
    kept = {key: value for key, value in values.items() if value != {}}
    return json.loads(json.dumps(kept))


def changed_on_resume(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that differ between the run's configuration and the wanted one and would change its course: key -> (saved,
    wanted). See `resume_rules`.
    """
    found = differences(saved, wanted)
    return {key: values for key, values in found.items() if resume_rules.group(key) is resume_rules.FIXED}


def refusal(changed: Mapping[str, tuple[Any, Any]], owner: str) -> str:
    """What to say of keys that `changed_on_resume` has found; `owner` is what `saved` was of, "the run" for example."""
    items = [f"{key}: {owner} has {before!r}, asked for {after!r}" for key, (before, after) in changed.items()]
    why = sorted({resume_rules.reason(key) for key in changed})
    return (
        f"these would change the course of the run, so start a new one for them: {'; '.join(items)} ({'; '.join(why)})"
    )
