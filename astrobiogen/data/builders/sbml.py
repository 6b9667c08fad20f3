"""SBML genome-scale models by libsbml: species, reactions, flux bounds from the three conventions in use.

cobrapy with GLPK aborts the whole process on ids such as ``M_cpd00001_LSQBKT_c_RSQBKT_``; libsbml only reads.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import libsbml
import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import features
from astrobiogen.data.builders import chemistry
from astrobiogen.data.errors import DataError

DEFAULT_FLUX = 1000.0  # mmol / gDW / h: the customary "no limit" where a model states none
# infinite bounds are cut here to keep the LP bounded; 999,999 is the largest finite "no limit" found in the files
LARGE_FLUX = 1e6
_FORMULA_NOTE = re.compile(r"FORMULA:\s*([A-Za-z0-9]+)", re.IGNORECASE)
_CHARGE_NOTE = re.compile(r"CHARGE:\s*(-?\d+)", re.IGNORECASE)
_BIOMASS = re.compile(r"biomass|growth|\bBOF\b", re.IGNORECASE)
_GENE_NOTE = re.compile(r"GENE[_ ]ASSOCIATION:\s*([^<\s][^<]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Network:
    """One metabolic network: M metabolites first, then R reactions; E nonzero stoichiometric entries.

    Attributes
    ----------
    columns
        ``features.NodeColumns`` of the N = M + R nodes.
    metabolites
        M.
    edge_index, stoichiometry
        int64 [2, E] along the flow, float64 [E] signed (rounding to float32 breaks conserved moieties: 16 of 64 models
        stop growing).
    lower, upper, objective
        float64 [R]; flux bounds in mmol/gDW/h and the model's own objective.
    exchange_gas
        uint8 [R]; for an exchange of a gas 1 + its index in ``features.GASES``, else 0. Negative flux is uptake.
    uptake_sign
        int8 [R]; -1 where a negative flux of the exchange brings the metabolite in, +1 where a positive one does, 0
        otherwise.
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


def read_text(path: Path) -> str:
    """Text of an ``.xml``, ``.sbml`` or ``.xml.gz`` file; a truncated archive or one that is not SBML is a
    ``DataError``.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(path, "", f"cannot be read ({error})") from error
    if data[:2] == b"PK":
        raise DataError(path, "", "is a zip (COMBINE) archive, not SBML; unpack it first")
    text = data.decode("utf-8", errors="replace")
    if "<sbml" not in text[:4000]:
        raise DataError(path, "", "is not SBML (no <sbml> element near its start)")
    return text


def _bounds(reaction: libsbml.Reaction, model: libsbml.Model, old: dict[tuple[str, str], float]) -> tuple[float, float]:
    """Flux bounds: fbc v2 attributes, else fbc v1 list, else kinetic-law parameters, else the reversible flag."""
    low, high = (-DEFAULT_FLUX if reaction.getReversible() else 0.0), DEFAULT_FLUX
    plugin = reaction.getPlugin("fbc")
    if plugin is not None and hasattr(plugin, "isSetLowerFluxBound") and plugin.isSetLowerFluxBound():
        lower, upper = (model.getParameter(b) for b in (plugin.getLowerFluxBound(), plugin.getUpperFluxBound()))
        return (lower.getValue() if lower else low), (upper.getValue() if upper else high)
    key = reaction.getId()
    if (key, "low") in old or (key, "high") in old:
        return old.get((key, "low"), low), old.get((key, "high"), high)
    law = reaction.getKineticLaw()
    if law is not None:
        values = {
            p.getId().upper(): p.getValue() for p in (*law.getListOfParameters(), *law.getListOfLocalParameters())
        }
        return values.get("LOWER_BOUND", low), values.get("UPPER_BOUND", high)
    return low, high


def _old_bounds(model: libsbml.Model) -> dict[tuple[str, str], float]:
    """Bounds of fbc version 1 (``listOfFluxBounds``)."""
    plugin, found = model.getPlugin("fbc"), {}
    if plugin is None:
        return found
    for k in range(plugin.getNumFluxBounds()):
        bound = plugin.getFluxBound(k)
        operation = bound.getOperation()
        for name, words in (("low", ("greaterEqual", "greater", "equal")), ("high", ("lessEqual", "less", "equal"))):
            if operation in words:
                found[bound.getReaction(), name] = bound.getValue()
    return found


def _objective(model: libsbml.Model) -> dict[str, float]:
    """Objective coefficients by reaction id: fbc, else kinetic-law ``OBJECTIVE_COEFFICIENT``."""
    plugin = model.getPlugin("fbc")
    if plugin is not None and plugin.getNumObjectives():
        active = plugin.getActiveObjective() or plugin.getObjective(0)
        return {flux.getReaction(): flux.getCoefficient() for flux in active.getListOfFluxObjectives()}
    found: dict[str, float] = {}
    for reaction in model.getListOfReactions():
        law = reaction.getKineticLaw()
        if law is not None:
            for p in (*law.getListOfParameters(), *law.getListOfLocalParameters()):
                if p.getId().upper() == "OBJECTIVE_COEFFICIENT" and p.getValue() != 0:
                    found[reaction.getId()] = p.getValue()
    return found


def _biomass(reactions: list[libsbml.Reaction]) -> dict[str, float]:
    """For a model without an objective: the reaction called biomass or growth that has the most participants (11 of
    the 96 models).
    """
    named = [r for r in reactions if _BIOMASS.search(f"{r.getId()} {r.getName()}")]
    largest = max(named, key=lambda r: r.getNumReactants() + r.getNumProducts(), default=None)
    return {largest.getId(): 1.0} if largest is not None else {}


@dataclass
class _Species:
    flags: int
    compartment: int
    elements: list[int]
    charge: int
    cofactor: int
    gas: int


def _species(item: libsbml.Species, places: dict[str, int]) -> _Species:
    notes = item.getNotesString() if item.isSetNotes() else ""
    plugin = item.getPlugin("fbc")
    formula = plugin.getChemicalFormula() if plugin is not None and plugin.isSetChemicalFormula() else ""
    if not formula and (found := _FORMULA_NOTE.search(notes)):
        formula = found.group(1)
    elements, known = chemistry.parse_formula(formula)
    charge: int | None = None
    if plugin is not None and plugin.isSetCharge():
        charge = plugin.getCharge()
    elif item.isSetCharge():
        charge = item.getCharge()
    elif found := _CHARGE_NOTE.search(notes):
        charge = int(found.group(1))
    if charge is not None and abs(charge) > 127:
        charge = None  # placeholders such as -888 or 2147483647 stand for "unknown" in several models
    boundary = item.getBoundaryCondition() or item.getId().endswith("_b") or item.getId().endswith("_boundary")
    flags = features.BOUNDARY * boundary | features.FORMULA * known | features.CHARGE * (charge is not None)
    words = chemistry.spellings(item.getId(), item.getName())
    return _Species(
        flags,
        places.get(item.getCompartment(), 8),
        elements,
        charge or 0,
        chemistry.cofactor_code(words),
        chemistry.gas_code(words),
    )


def _participants(reaction: libsbml.Reaction) -> dict[str, float]:
    """Net signed stoichiometry by species id; a species on both sides with equal amounts drops out."""
    net: dict[str, float] = {}
    for sign, side in ((-1.0, reaction.getListOfReactants()), (1.0, reaction.getListOfProducts())):
        for ref in side:
            amount = ref.getStoichiometry()
            net[ref.getSpecies()] = net.get(ref.getSpecies(), 0.0) + sign * (1.0 if np.isnan(amount) else amount)
    return {key: value for key, value in net.items() if value != 0.0}


def read_network(path: Path) -> Network:
    """Read one SBML file.

    Raises
    ------
    DataError
        Unreadable file, fatal SBML errors, no reactions, a reaction that names an unknown species, or no stoichiometry
        at all.
    """
    document = libsbml.readSBMLFromString(read_text(path))
    model = document.getModel()
    if model is None:
        raise DataError(path, "model", f"no model in the SBML ({document.getNumErrors()} errors)")
    places = {c.getId(): chemistry.compartment_code(c.getId(), c.getName()) for c in model.getListOfCompartments()}
    species = {s.getId(): _species(s, places) for s in model.getListOfSpecies()}
    reactions = [r for r in model.getListOfReactions() if _participants(r)]
    if not species or not reactions:
        raise DataError(path, "listOfReactions", f"empty network ({len(species)} species, {len(reactions)} reactions)")
    return _assemble(path, model, species, reactions)


def _assemble(
    path: Path, model: libsbml.Model, species: dict[str, _Species], reactions: list[libsbml.Reaction]
) -> Network:
    order = {key: k for k, key in enumerate(species)}
    m, r = len(order), len(reactions)
    old, goal = _old_bounds(model), _objective(model) or _biomass(reactions)
    lower, upper, objective = np.zeros(r), np.zeros(r), np.zeros(r)
    exchange_gas, uptake_sign = np.zeros(r, np.uint8), np.zeros(r, np.int8)
    rows: list[_Species] = list(species.values())
    ec = np.zeros(m + r, np.uint8)
    edges: list[tuple[int, int]] = []
    amounts: list[float] = []
    for j, reaction in enumerate(reactions):
        net = _participants(reaction)
        if unknown := [key for key in net if key not in order]:
            raise DataError(path, reaction.getId(), f"names unknown species {unknown[:3]}")
        low, high = _bounds(reaction, model, old)
        lower[j], upper[j] = (float(np.clip(np.nan_to_num(b, nan=0.0), -LARGE_FLUX, LARGE_FLUX)) for b in (low, high))
        objective[j] = goal.get(reaction.getId(), 0.0)
        inside = [key for key in net if not species[key].flags & features.BOUNDARY]
        outside_only = len(inside) == 1
        row, ec[m + j] = _reaction_row(reaction, net, species, lower[j], upper[j], outside_only)
        if outside_only:
            uptake_sign[j] = 1 if net[inside[0]] > 0 else -1
            exchange_gas[j] = species[inside[0]].gas
            opened = upper[j] > 0 if uptake_sign[j] > 0 else lower[j] < 0
            row.flags |= features.UPTAKE * opened
            row.gas = species[inside[0]].gas
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
        objective,
        exchange_gas,
        uptake_sign,
    )


def _reaction_row(
    reaction: libsbml.Reaction,
    net: dict[str, float],
    species: dict[str, _Species],
    low: float,
    high: float,
    exchange: bool,
) -> tuple[_Species, int]:
    notes = reaction.getNotesString() if reaction.isSetNotes() else ""
    annotation = reaction.getAnnotationString() if reaction.isSetAnnotation() else ""
    plugin = reaction.getPlugin("fbc")
    gene = (
        plugin is not None and hasattr(plugin, "isSetGeneProductAssociation") and plugin.isSetGeneProductAssociation()
    ) or bool(_GENE_NOTE.search(notes))
    touched = 0
    for key in net:
        touched |= species[key].compartment
    transport = not exchange and touched.bit_count() > 1
    flags = (
        features.REACTION
        | features.EXCHANGE * exchange
        | features.TRANSPORT * transport
        | features.REVERSIBLE * (low < 0 < high)
        | features.GENE * gene
        | features.BLOCKED * (low == 0 == high)
    )
    code = (
        chemistry.ec_code(annotation)
        or chemistry.ec_code(notes)
        or chemistry.ec_code(reaction.getId().removeprefix("R_"))
    )
    return _Species(int(flags), touched, [0] * len(features.ELEMENTS), 0, 0, 0), code


def _columns(rows: list[_Species], ec: NDArray[np.uint8]) -> features.NodeColumns:
    return features.NodeColumns(
        np.array([row.flags for row in rows], np.uint16),
        np.array([row.compartment for row in rows], np.uint8),
        np.array([row.elements for row in rows], np.uint16),
        np.array([row.charge for row in rows], np.int8),
        ec,
        np.array([row.cofactor for row in rows], np.uint8),
        np.array([row.gas for row in rows], np.uint8),
    )
