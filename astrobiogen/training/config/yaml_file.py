"""Configuration files: each key in them counts, or is refused."""

from typing import Any

import jsonargparse
import yaml

MODE = "astrobiogen"


class DuplicateKeyError(yaml.YAMLError):
    """A key is given twice, of which one value would be lost."""


def load(text: str) -> Any:
    """What the YAML `text` holds; keys with dots as the nested mappings that they stand for.

    Raises:
        yaml.YAMLError: no YAML, or a key is given twice.
    """
    _look_for_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
    value = jsonargparse.get_loader("yaml")(text)
    return nest(value) if isinstance(value, dict) else value


def nest(values: dict[str, Any], inside: str = "") -> dict[str, Any]:
    """`{"a.b": 1, "a": {"c": 2}}` as `{"a": {"b": 1, "c": 2}}`; `inside` is where `values` stands.

    Raises:
        DuplicateKeyError: a key is given in both ways, or is a value and a mapping.
    """
    made: dict[str, Any] = {}
    for key, value in values.items():
        first, _, rest = str(key).partition(".")
        value = {rest: value} if rest else value
        if first not in made:
            made[first] = value
        elif isinstance(made[first], dict) and isinstance(value, dict):
            made[first] = _merged(made[first], value, f"{inside}{first}.")
        else:
            raise DuplicateKeyError(f"{inside}{first}: is given twice")
    return {key: nest(value, f"{inside}{key}.") if isinstance(value, dict) else value for key, value in made.items()}


def _merged(one: dict[str, Any], other: dict[str, Any], inside: str) -> dict[str, Any]:
    one, other = nest(one, inside), nest(other, inside)
    both = one.keys() & other.keys()
    for key in both:
        if not (isinstance(one[key], dict) and isinstance(other[key], dict)):
            raise DuplicateKeyError(f"{inside}{key}: is given twice")
    return one | other | {key: _merged(one[key], other[key], f"{inside}{key}.") for key in both}


def _look_for_duplicates(node: yaml.Node | None) -> None:
    """Raise DuplicateKeyError for a mapping below `node` that YAML would keep the last of two values of."""
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.value in names and isinstance(key, yaml.ScalarNode):
                raise DuplicateKeyError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            names.add(key.value if isinstance(key, yaml.ScalarNode) else "")
            _look_for_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _look_for_duplicates(item)
