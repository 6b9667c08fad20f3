"""The one reader of configurations: from the command line, from files, and from what checkpoints hold."""

import dataclasses
import re
from typing import Any

import jsonargparse
import yaml

from astrobiogen.training.config import yaml_file
from astrobiogen.training.config.model import asked
from astrobiogen.training.config.schema import TrainConfig

_OR_NULL = (
    r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (Expected .*?) "
    r"- Expected a <class 'NoneType'> Given value type: .*? Given value: "
)
# A value of the wrong type, and a key inside one that holds a single value, in the parser's own words.
_WRONG_TYPE = r'Parser key "(.*?)": Expected a <class \'(\w+)\'>\. Got value: '
_INSIDE = _WRONG_TYPE + r"NestedArg\(key='(.*?)', val=.*\)"


class Parser(jsonargparse.ArgumentParser):
    """A parser with an option for every key of `TrainConfig`."""

    def __init__(self, **options: Any) -> None:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        jsonargparse.set_loader(yaml_file.MODE, yaml_file.load, exceptions=(yaml.YAMLError,))
        super().__init__(exit_on_error=False, allow_abbrev=False, parser_mode=yaml_file.MODE, **options)

    def dump(self, *args: Any, **options: Any) -> str:
        """As YAML; of the model what is changed."""
        values = yaml_file.load(super().dump(*args, **options))
        changes = asked(values.pop("model", {}))
        place = list(values).index("epochs") + 1 if "epochs" in values else 0
        items = list(values.items())
        return yaml.safe_dump(dict([*items[:place], ("model", changes), *items[place:]]), sort_keys=False)

    def made(self, values: jsonargparse.Namespace) -> TrainConfig:
        """The configuration in parsed `values`.

        Raises:
            ValueError: a value is out of range, or stands where a group of them is expected.
        """
        _look_for_groups(TrainConfig(), values, "")
        made = self.instantiate(values)
        return TrainConfig(**{field.name: getattr(made, field.name) for field in dataclasses.fields(TrainConfig)})


def _look_for_groups(like: Any, values: jsonargparse.Namespace, inside: str) -> None:
    """Raise ValueError where `values` has something else for a part of the configuration `like`."""
    for field in dataclasses.fields(like):
        part, value = getattr(like, field.name), values.get(field.name)
        if dataclasses.is_dataclass(part):
            if not isinstance(value, jsonargparse.Namespace):
                raise ValueError(f"{inside}{field.name}: got {value!r}, expected keys and values")
            _look_for_groups(part, value, f"{inside}{field.name}.")


def complaint(error: Exception) -> str:
    """What the parser says of a bad value, in one line; a key that may be null is said to expect its own type."""
    text = re.sub(_OR_NULL, r"\1. Got value: ", " ".join(str(error).split()))
    text = re.sub(_INSIDE, r"\1: holds one \2, no key \3", text)
    return re.sub(_WRONG_TYPE, r"\1: expected \2, got ", text)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration of which `as_dict.to_dict` gave `values`; what they lack has its default.

    Raises:
        ValueError: unknown key, wrong type or out of range, named in full.
    """
    parser = Parser()
    parser.add_class_arguments(TrainConfig)
    try:
        return parser.made(parser.parse_object(yaml_file.nest(values)))
    except (jsonargparse.ArgumentError, yaml.YAMLError) as error:
        raise ValueError(complaint(error)) from error
