"""Genome-scale models in the JSON format of cobrapy and BiGG."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.files import unpacked
from astrobiogen.datatools.networks import assemble, chemistry
from astrobiogen.datatools.networks.assemble import DEFAULT_FLUX, Network

_EC_KEYS = ("ec-code", "ec_code", "EC Number")


def _number(path: Path, where: str, value: Any) -> float:
    """A finite or infinite number; cobrapy writes infinite bounds as strings."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(path, where, f"is {value!r}, expected a number") from error
    if math.isnan(number):
        raise DataError(path, where, "is NaN, expected a number")
    return number


def _document(path: Path) -> dict[str, Any]:
    body = unpacked(path)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(path, "", f"cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise DataError(path, "", f"holds a {type(document).__name__}, expected a cobra model")
    for key in ("metabolites", "reactions"):
        if not isinstance(document.get(key), list) or not all(isinstance(i, dict) for i in document[key]):
            raise DataError(path, key, f"is not a list of objects; the file has the keys {sorted(document)[:8]}")
    return document


def _charge(value: Any) -> int | None:
    """A whole number, or None: unknown."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _species(path: Path, k: int, item: dict[str, Any], titles: dict[str, str]) -> tuple[str, assemble.Species]:
    identifier = item.get("id")
    if not isinstance(identifier, str):
        raise DataError(path, f"metabolites[{k}].id", f"is {identifier!r}, expected text")
    compartment = str(item.get("compartment", ""))
    return identifier, assemble.species(
        identifier,
        str(item.get("name", "")),
        chemistry.compartment_code(compartment, titles.get(compartment, "")),
        str(item.get("formula") or ""),
        _charge(item.get("charge")),
        bool(identifier.endswith(("_b", "_boundary"))),
    )


def _reaction(path: Path, k: int, item: dict[str, Any]) -> tuple[assemble.Reaction, float]:
    identifier, net = item.get("id"), item.get("metabolites")
    if not isinstance(identifier, str) or not isinstance(net, dict):
        raise DataError(path, f"reactions[{k}]", f"id {identifier!r}, metabolites {type(net).__name__}")
    amounts = {name: _number(path, f"{identifier}.{name}", value) for name, value in net.items()}
    low = _number(path, f"{identifier}.lower_bound", item.get("lower_bound", 0.0))
    high = _number(path, f"{identifier}.upper_bound", item.get("upper_bound", DEFAULT_FLUX))
    annotation = item.get("annotation")
    codes = [annotation[key] for key in _EC_KEYS if key in annotation] if isinstance(annotation, dict) else []
    text = " ".join(f"ec-code/{c}" for code in codes for c in (code if isinstance(code, list) else [code]))
    made = assemble.Reaction(
        identifier,
        str(item.get("name", "")),
        {name: amount for name, amount in amounts.items() if amount != 0.0},
        low,
        high,
        len(amounts),
        bool(str(item.get("gene_reaction_rule") or "").strip()),
        chemistry.ec_code(text),
    )
    return made, _number(path, f"{identifier}.objective_coefficient", item.get("objective_coefficient", 0.0))


def read_network(path: Path) -> Network:
    """Read one ``.json`` or ``.json.gz`` model.

    Raises:
        DataError: Not a cobra model, an empty one, a bound that is no number, or a reaction that names an unknown
            metabolite.
    """
    document = _document(path)
    titles = document.get("compartments")
    titles = {str(k): str(v) for k, v in titles.items()} if isinstance(titles, dict) else {}
    metabolites = dict(_species(path, k, item, titles) for k, item in enumerate(document["metabolites"]))
    made = [_reaction(path, k, item) for k, item in enumerate(document["reactions"])]
    objective = {reaction.name: coefficient for reaction, coefficient in made if coefficient != 0.0}
    return assemble.assemble(path, metabolites, [reaction for reaction, _ in made], objective)
