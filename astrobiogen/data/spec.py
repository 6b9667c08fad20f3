"""``DataSpec``: everything a model must know about a dataset, and the statistics that were fitted on its training
part.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any

from astrobiogen.data.errors import DataError

Row = tuple[float, ...]


@dataclass(frozen=True)
class DataSpec:
    """Axes, sizes and training-set statistics of a dataset.

    Attributes:
        variables, units: Of the cube's first axis: ("ta", "hus") in ("K", "kg kg-1").
        levels, level_bounds: Sigma = p / p_surface at layer mid points [lev] and interfaces [lev + 1], from the top.
        latitudes, latitude_bounds: Degrees north [lat] from the north, and their edges [lat + 1]; area weights are
            differences of sin(bounds).
        longitudes: Degrees east [lon].
        months: Time steps of a cube (12 equal bins of the segment).
        n_epochs: Length G of the geological axis; index G - 1 is the target epoch.
        planet_param_names, planet_param_units: Order of ``planet_params``.
        node_features, edge_features, laplacian_dim, random_walk_dim: Widths of the graph tensors.
        wavelengths: Micrometres [W].
        vocab_size, pad_id, bos_id, eos_id, sep_id, max_text_tokens: Of the tokenizer and of ``input_ids``.
        cube_mean, cube_std: [V][lev] in the variable's unit, from training climates only.
        param_mean, param_std: [P] from training planets only.
        spectrum_mean, spectrum_std: Of the albedo, from the spectra that training may see.
        class_threshold: Class 1 is S >= this.
        fitted_on: Names of the planets whose data entered the statistics.
    """

    variables: tuple[str, ...]
    units: tuple[str, ...]
    levels: Row
    level_bounds: Row
    latitudes: Row
    latitude_bounds: Row
    longitudes: Row
    months: int
    n_epochs: int
    planet_param_names: tuple[str, ...]
    planet_param_units: tuple[str, ...]
    wavelengths: Row
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    sep_id: int
    max_text_tokens: int
    cube_mean: tuple[Row, ...]
    cube_std: tuple[Row, ...]
    param_mean: Row
    param_std: Row
    spectrum_mean: float
    spectrum_std: float
    class_threshold: float
    fitted_on: tuple[str, ...]
    node_features: int = 64
    edge_features: int = 2
    laplacian_dim: int = 16
    random_walk_dim: int = 8

    @property
    def n_wavelengths(self) -> int:
        """Number W of spectral bins."""
        return len(self.wavelengths)

    @property
    def n_planet_params(self) -> int:
        """Number P of planet parameters."""
        return len(self.planet_param_names)

    @property
    def cube_shape(self) -> tuple[int, int, int, int, int, int]:
        """(V, T, G, lev, lat, lon) of one sample's cube."""
        return (
            len(self.variables),
            self.months,
            self.n_epochs,
            len(self.levels),
            len(self.latitudes),
            len(self.longitudes),
        )

    def to_json(self) -> str:
        """JSON text, keys sorted."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "spec.json") -> DataSpec:
        """Inverse of ``to_json``; a missing, unknown or badly typed field is a ``DataError`` that names it."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(source, "", f"is not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise DataError(source, "", f"holds a {type(raw).__name__}, expected an object")
        hints = typing.get_type_hints(cls)
        required = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - required):
            raise DataError(source, unknown[0], "unknown field")
        if missing := sorted(required - set(raw)):
            raise DataError(source, missing[0], "missing field")
        return cls(**{name: _typed(source, name, hints[name], value) for name, value in raw.items()})


def _typed(source: str, name: str, hint: Any, value: Any) -> Any:
    """``value`` from JSON as ``hint`` (int, float, str or nested tuples of them)."""
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise DataError(source, name, f"is {value!r}, expected a list")
        return tuple(_typed(source, name, typing.get_args(hint)[0], item) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise DataError(source, name, f"is {value!r}, expected {hint.__name__}")
    if isinstance(value, float) and value - value != 0:
        raise DataError(source, name, f"is {value}, expected a finite number")
    return value
