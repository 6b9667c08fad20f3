"""SBML genome-scale models by libsbml: species, reactions, flux bounds from the three conventions in use.

cobrapy with GLPK aborts the whole process on ids such as ``M_cpd00001_LSQBKT_c_RSQBKT_``; libsbml only reads.
"""

from __future__ import annotations

import re
from pathlib import Path

import libsbml
import numpy as np

from astrobiogen.data.errors import DataError
from astrobiogen.data.storage.guarded import xml_problem
from astrobiogen.datatools.files import unpacked
from astrobiogen.datatools.networks import assemble, chemistry
from astrobiogen.datatools.networks.assemble import DEFAULT_FLUX, Network

_FORMULA_NOTE = re.compile(r"FORMULA:\s*([A-Za-z0-9]+)", re.IGNORECASE)
_CHARGE_NOTE = re.compile(r"CHARGE:\s*(-?\d+)", re.IGNORECASE)
_GENE_NOTE = re.compile(r"GENE[_ ]ASSOCIATION:\s*([^<\s][^<]*)", re.IGNORECASE)


def read_text(path: Path) -> str:
    """Text of an ``.xml``, ``.sbml`` or ``.xml.gz`` file; a truncated archive or one that is not SBML is a
    ``DataError``.
    """
    data = unpacked(path)
    if data[:2] == b"PK":
        raise DataError(path, "", "is a zip (COMBINE) archive, not SBML; unpack it first")
    text = data.decode("utf-8", errors="replace")
    if "<sbml" not in text[:4000]:
        raise DataError(path, "", "is not SBML (no <sbml> element near its start)")
    if problem := xml_problem(text):
        raise DataError(path, "", problem)
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


def _species(item: libsbml.Species, places: dict[str, int]) -> assemble.Species:
    notes = item.getNotesString() if item.isSetNotes() else ""
    plugin = item.getPlugin("fbc")
    formula = plugin.getChemicalFormula() if plugin is not None and plugin.isSetChemicalFormula() else ""
    if not formula and (found := _FORMULA_NOTE.search(notes)):
        formula = found.group(1)
    charge: int | None = None
    if plugin is not None and plugin.isSetCharge():
        charge = plugin.getCharge()
    elif item.isSetCharge():
        charge = item.getCharge()
    elif found := _CHARGE_NOTE.search(notes):
        charge = int(found.group(1))
    boundary = item.getBoundaryCondition() or item.getId().endswith("_b") or item.getId().endswith("_boundary")
    place = places.get(item.getCompartment(), assemble.OTHER_COMPARTMENT)
    return assemble.species(item.getId(), item.getName(), place, formula, charge, boundary)


def _participants(reaction: libsbml.Reaction) -> dict[str, float]:
    """Net signed stoichiometry by species id; a species on both sides with equal amounts drops out."""
    net: dict[str, float] = {}
    for sign, side in ((-1.0, reaction.getListOfReactants()), (1.0, reaction.getListOfProducts())):
        for ref in side:
            amount = ref.getStoichiometry()
            net[ref.getSpecies()] = net.get(ref.getSpecies(), 0.0) + sign * (1.0 if np.isnan(amount) else amount)
    return {key: value for key, value in net.items() if value != 0.0}


def _reaction(reaction: libsbml.Reaction, model: libsbml.Model, old: dict[tuple[str, str], float]) -> assemble.Reaction:
    notes = reaction.getNotesString() if reaction.isSetNotes() else ""
    annotation = reaction.getAnnotationString() if reaction.isSetAnnotation() else ""
    plugin = reaction.getPlugin("fbc")
    gene = (
        plugin is not None and hasattr(plugin, "isSetGeneProductAssociation") and plugin.isSetGeneProductAssociation()
    ) or bool(_GENE_NOTE.search(notes))
    ec = (
        chemistry.ec_code(annotation)
        or chemistry.ec_code(notes)
        or chemistry.ec_code(reaction.getId().removeprefix("R_"))
    )
    low, high = _bounds(reaction, model, old)
    participants = reaction.getNumReactants() + reaction.getNumProducts()
    net = _participants(reaction)
    return assemble.Reaction(reaction.getId(), reaction.getName(), net, low, high, participants, gene, ec)


def read_network(path: Path) -> Network:
    """Read one SBML file.

    Raises:
        DataError: Unreadable file, fatal SBML errors, no reactions, a reaction that names an unknown species, or no
            stoichiometry at all.
    """
    document = libsbml.readSBMLFromString(read_text(path))
    model = document.getModel()
    if model is None:
        raise DataError(path, "model", f"no model in the SBML ({document.getNumErrors()} errors)")
    places = {c.getId(): chemistry.compartment_code(c.getId(), c.getName()) for c in model.getListOfCompartments()}
    species = {s.getId(): _species(s, places) for s in model.getListOfSpecies()}
    old = _old_bounds(model)
    reactions = [_reaction(r, model, old) for r in model.getListOfReactions()]
    return assemble.assemble(path, species, reactions, _objective(model))
