"""What a run changes in the model of its preset: a key for each of the model's, of the same type."""

import dataclasses
import sys
import typing
from typing import Any, TypeVar

from astrobiogen import models
from astrobiogen.models.system_config import MODALITIES

# Sizes of the parts, which the model fills in by itself.
_FILLED_IN = ("modality_dims",)
Config = TypeVar("Config")


def _made(name: str, fields: list[tuple[str, Any, Any]]) -> type[Any]:
    """A frozen dataclass that this module has by its name, so that processes can send each other its values."""
    made = dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__module__": __name__})
    setattr(sys.modules[__name__], name, made)
    return made


def _by_modality(name: str, kind: Any) -> type[Any]:
    """A dictionary from modalities to values as a dataclass, whose keys are then as known as any."""
    return _made(name, [(modality, kind | None, None) for modality in MODALITIES])


def _changes(owner: type[Any], name: str) -> type[Any]:
    """A frozen dataclass with the keys of the dataclass `owner`: for each of its parts one made in the same way, for
    each value its type or None, which stands for no change.
    """
    kinds = typing.get_type_hints(owner)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(owner):
        kind: typing.Any = kinds[field.name]
        part: typing.Any = None
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            part = _changes(kind, f"{name}_{field.name}")
        elif typing.get_origin(kind) is dict:
            part = _by_modality(f"{name}_{field.name}", typing.get_args(kind)[1])
        if field.name not in _FILLED_IN:
            default = part() if part else None
            fields.append((field.name, part or (kind | None), dataclasses.field(default=default)))
    made = _made(name, fields)
    made.__doc__ = owner.__doc__
    return made


@dataclasses.dataclass(frozen=True)
class ModelChanges(_changes(models.MultiModalTrainingConfig, "_ModelChanges")):
    """Changes to the model of the preset; null: as the preset has it."""


def applied(config: Config, changes: Any) -> Config:
    """The dataclass `config` with what `changes` holds (see `ModelChanges`) put in.

    Raises:
        ValueError: a value is out of range, or does not fit the others.
    """
    new: dict[str, Any] = {}
    for field in dataclasses.fields(changes):
        value, old = getattr(changes, field.name), getattr(config, field.name)
        if isinstance(old, dict):
            asked = {key: item for key, item in dataclasses.asdict(value).items() if item is not None}
            new[field.name] = old | asked
        elif dataclasses.is_dataclass(value):
            new[field.name] = applied(old, value)
        elif value is not None:
            new[field.name] = value
    return dataclasses.replace(typing.cast(Any, config), **new)


def asked(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` without what is None, and without the parts that then hold nothing."""
    kept = {key: asked(value) if isinstance(value, dict) else value for key, value in nested.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}
