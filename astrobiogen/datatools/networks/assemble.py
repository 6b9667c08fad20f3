"""From species and reactions, whatever file they came from, to one metabolic network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.data.networks import features
from astrobiogen.datatools.networks import chemistry

DEFAULT_FLUX = 1000.0  # mmol / gDW / h: the customary "no limit" where a model states none
# infinite bounds are cut here to keep the LP bounded; 999,999 is the largest finite "no limit" found in the files
LARGE_FLUX = 1e6
STATED, BY_NAME, NONE = "stated", "biomass reaction by name", "none"
OTHER_COMPARTMENT = 1 << features.COMPARTMENTS.index("other")
_BIOMASS = re.compile(r"biomass|growth|\bBOF\b", re.IGNORECASE)
_UNKNOWN_CHARGE = 127  # larger ones are placeholders such as -888 or 2147483647 in several models


@dataclass
class Species:
    """A metabolite (or the node of a reaction) in integer columns; see ``features.NodeColumns``."""

    flags: int
    compartment: int
    elements: list[int]
    charge: int
    cofactor: int
    gas: int


@dataclass(frozen=True)
class Reaction:
    """One reaction: net signed stoichiometry by species id, bounds, number of participants as written, and whether a
    gene is named. ``ec`` is 0 or the first digit of its enzyme number.
    """

    name: str
    title: str
    net: Mapping[str, float]
    lower: float
    upper: float
    participants: int
    gene: bool
    ec: int


@dataclass(frozen=True)
class Network:
    """One metabolic network: M metabolites first, then R reactions; E nonzero stoichiometric entries.

    Attributes:
        columns: ``features.NodeColumns`` of the N = M + R nodes.
        metabolites: M.
        edge_index, stoichiometry: int64 [2, E] along the flow, float64 [E] signed (rounding to float32 breaks conserved
            moieties: 16 of 64 models stop growing).
        lower, upper, objective: float64 [R]; flux bounds in mmol/gDW/h and the model's own objective.
        exchange_gas: uint8 [R]; for an exchange of a gas 1 + its index in ``features.GASES``, else 0. Negative flux is
            uptake.
        uptake_sign: int8 [R]; -1 where a negative flux of the exchange brings the metabolite in, +1 where a positive
            one does, 0 otherwise.
        objective_source: ``STATED``, ``BY_NAME`` (the model states none; the largest reaction called biomass or growth
            is used), or ``NONE``.
    """

    columns: features.NodeColumns
    metabolites: int
    edge_index: NDArray[np.int64]
    stoichiometry: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    objective: NDArray[np.float64]
    exchange_gas: NDArray[np.uint8]
    uptake_sign: NDArray[np.int8]
    objective_source: str


def species(identifier: str, title: str, compartment: int, formula: str, charge: int | None, boundary: bool) -> Species:
    """A metabolite; an unreadable formula and a missing or impossible charge are masked by their flags."""
    elements, known = chemistry.parse_formula(formula)
    if charge is not None and abs(charge) > _UNKNOWN_CHARGE:
        charge = None
    flags = features.BOUNDARY * boundary | features.FORMULA * known | features.CHARGE * (charge is not None)
    words = chemistry.spellings(identifier, title)
    return Species(flags, compartment, elements, charge or 0, chemistry.cofactor_code(words), chemistry.gas_code(words))


def _goal(reactions: Sequence[Reaction], stated: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Objective coefficients and where they come from; 11 of the 96 BioModels files state none."""
    if any(stated.values()):
        return dict(stated), STATED
    named = [r for r in reactions if _BIOMASS.search(f"{r.name} {r.title}")]
    largest = max(named, key=lambda r: r.participants, default=None)
    return ({largest.name: 1.0}, BY_NAME) if largest is not None else ({}, NONE)


def assemble(
    path: Path, metabolites: dict[str, Species], reactions: Sequence[Reaction], objective: Mapping[str, float]
) -> Network:
    """The network; an empty one, and a reaction of an unknown species, is a ``DataError`` that names the reaction."""
    reactions = [r for r in reactions if r.net]
    if not metabolites or not reactions:
        raise DataError(
            path, "listOfReactions", f"empty network ({len(metabolites)} species, {len(reactions)} reactions)"
        )
    goal, source = _goal(reactions, objective)
    order = {key: k for k, key in enumerate(metabolites)}
    m, r = len(order), len(reactions)
    lower, upper, wanted = np.zeros(r), np.zeros(r), np.zeros(r)
    exchange_gas, uptake_sign = np.zeros(r, np.uint8), np.zeros(r, np.int8)
    rows: list[Species] = list(metabolites.values())
    ec = np.zeros(m + r, np.uint8)
    edges: list[tuple[int, int]] = []
    amounts: list[float] = []
    for j, reaction in enumerate(reactions):
        net = reaction.net
        if unknown := [key for key in net if key not in order]:
            raise DataError(path, reaction.name, f"names unknown species {unknown[:3]}")
        lower[j], upper[j] = (
            float(np.clip(np.nan_to_num(b, nan=0.0), -LARGE_FLUX, LARGE_FLUX)) for b in (reaction.lower, reaction.upper)
        )
        wanted[j] = goal.get(reaction.name, 0.0)
        inside = [key for key in net if not metabolites[key].flags & features.BOUNDARY]
        exchange = len(inside) == 1
        row, ec[m + j] = _reaction_row(reaction, metabolites, lower[j], upper[j], exchange), reaction.ec
        if exchange:
            uptake_sign[j] = 1 if net[inside[0]] > 0 else -1
            exchange_gas[j] = metabolites[inside[0]].gas
            opened = upper[j] > 0 if uptake_sign[j] > 0 else lower[j] < 0
            row.flags |= features.UPTAKE * opened
            row.gas = metabolites[inside[0]].gas
        rows.append(row)
        for key, amount in net.items():
            edges.append((order[key], m + j) if amount < 0 else (m + j, order[key]))
            amounts.append(amount)
    return Network(
        _columns(rows, ec),
        m,
        np.array(edges, np.int64).T.reshape(2, -1),
        np.array(amounts),
        lower,
        upper,
        wanted,
        exchange_gas,
        uptake_sign,
        source,
    )


def _reaction_row(
    reaction: Reaction, metabolites: Mapping[str, Species], low: float, high: float, exchange: bool
) -> Species:
    touched = 0
    for key in reaction.net:
        touched |= metabolites[key].compartment
    transport = not exchange and touched.bit_count() > 1
    flags = (
        features.REACTION
        | features.EXCHANGE * exchange
        | features.TRANSPORT * transport
        | features.REVERSIBLE * (low < 0 < high)
        | features.GENE * reaction.gene
        | features.BLOCKED * (low == 0 == high)
    )
    return Species(int(flags), touched, [0] * len(features.ELEMENTS), 0, 0, 0)


def _columns(rows: list[Species], ec: NDArray[np.uint8]) -> features.NodeColumns:
    return features.NodeColumns(
        np.array([row.flags for row in rows], np.uint16),
        np.array([row.compartment for row in rows], np.uint8),
        np.array([row.elements for row in rows], np.uint16),
        np.array([row.charge for row in rows], np.int8),
        ec,
        np.array([row.cofactor for row in rows], np.uint8),
        np.array([row.gas for row in rows], np.uint8),
    )
