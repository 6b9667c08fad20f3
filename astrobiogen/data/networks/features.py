"""The 64 documented node features of a metabolic network, and their computation from compact columns.

A network is stored as a few integer columns per node (``NodeColumns``) and expanded here, so that a bundled graph and
one that was just read from SBML pass through the same code. None of the features is, or is computed from, a growth
rate, a growth temperature or a name of a species.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ELEMENTS = ("C", "H", "N", "O", "P", "S", "Fe", "Mg")
ATOMIC_MASS = np.array([12.011, 1.008, 14.007, 15.999, 30.974, 32.06, 55.845, 24.305])  # g/mol, IUPAC 2021 abridged
COMPARTMENTS = ("cytosol", "extracellular", "periplasm", "other")
COFACTORS = (
    "atp", "adp", "nad", "nadh", "nadp", "nadph", "coa", "f420", "com", "ferredoxin", "proton", "water", "phosphate",
    "diphosphate", "fad", "quinone",
)  # fmt: skip
GASES = ("o2", "h2", "co2", "ch4", "n2", "h2s", "co", "nh4", "no")
EC_CLASSES = ("oxidoreductase", "transferase", "hydrolase", "lyase", "isomerase", "ligase", "translocase")

FEATURE_NAMES: tuple[str, ...] = (
    "is_metabolite", "is_reaction",
    *(f"compartment_{name}" for name in COMPARTMENTS),
    "log_in_degree", "log_out_degree",
    "boundary", "exchange", "transport", "reversible",
    *(f"log_{element}" for element in ELEMENTS),
    "formula_known", "charge_over_4", "charge_known",
    *(f"ec_{name}" for name in EC_CLASSES),
    *(f"cofactor_{name}" for name in COFACTORS),
    *(f"gas_{name}" for name in GASES),
    "log_substrates", "log_products", "log_max_stoichiometry", "fractional_stoichiometry",
    "ec_known", "gene_known", "uptake_open", "blocked", "log_mass",
)  # fmt: skip
NODE_FEATURES = 64
if len(FEATURE_NAMES) != NODE_FEATURES:
    raise AssertionError(f"the feature table has {len(FEATURE_NAMES)} names, the graphs have {NODE_FEATURES} columns")

# Bits of NodeColumns.flags.
REACTION, BOUNDARY, EXCHANGE, TRANSPORT, REVERSIBLE, FORMULA, CHARGE, GENE, UPTAKE, BLOCKED = (
    1 << k for k in range(10)
)


@dataclass(frozen=True)
class NodeColumns:
    """Integer columns of the N nodes of one network; metabolites and reactions in one numbering.

    Attributes:
        flags: uint16 [N], the bits above.
        compartments: uint8 [N], bit k set: the metabolite is in (the reaction touches) ``COMPARTMENTS[k]``.
        elements: uint16 [N, 8], atoms per molecule in the order ``ELEMENTS``; zero where unknown.
        charge: int8 [N], elementary charges; zero where unknown.
        ec, cofactor, gas: uint8 [N], 0 for none, else 1 + the index in ``EC_CLASSES``, ``COFACTORS``, ``GASES``.
    """

    flags: NDArray[np.uint16]
    compartments: NDArray[np.uint8]
    elements: NDArray[np.uint16]
    charge: NDArray[np.int8]
    ec: NDArray[np.uint8]
    cofactor: NDArray[np.uint8]
    gas: NDArray[np.uint8]


def has(columns: NodeColumns, bit: int) -> NDArray[np.bool_]:
    """Nodes [N] whose flag ``bit`` is set."""
    return (columns.flags & bit) != 0


def _one_hot(codes: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    out = np.zeros((codes.size, width), np.float32)
    rows = np.flatnonzero(codes)
    out[rows, codes[rows].astype(np.int64) - 1] = 1.0
    return out


def node_features(
    columns: NodeColumns, edge_index: NDArray[np.int64], stoichiometry: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Feature matrix [N, 64] in the order ``FEATURE_NAMES``.

    Charges are cut at 40 (a few models write 100), the largest stoichiometry at 1,000 (one writes 5e6). Counts enter
    as log(1 + n), degrees also divided by 4 so that hubs (protons, water: degree about 1,000) stay near 2. The
    stoichiometric features belong to reactions; the mass (log10 of 1 + g/mol, over 3) to metabolites with a known
    formula.

    Args:
        columns: Integer columns of the nodes.
        edge_index: int64 [2, E]; substrate to reaction, reaction to product.
        stoichiometry: float32 [E]; negative for substrates, positive for products.
    """
    n = columns.flags.size
    source, target = edge_index
    indegree, outdegree = np.bincount(target, minlength=n), np.bincount(source, minlength=n)
    reaction = has(columns, REACTION)
    owner = np.where(stoichiometry < 0, target, source)  # the reaction's end of each edge
    size = np.abs(stoichiometry)
    largest = np.zeros(n, np.float32)
    np.maximum.at(largest, owner, size)
    fractional = np.bincount(owner, weights=size != np.round(size), minlength=n) > 0
    elements = np.log1p(columns.elements.astype(np.float32))
    mass = np.log10(1.0 + columns.elements @ ATOMIC_MASS) / 3.0
    bits = np.stack([columns.compartments >> k & 1 for k in range(4)], axis=1)
    parts = [
        ~reaction, reaction, bits, np.log1p(indegree) / 4.0, np.log1p(outdegree) / 4.0,
        *(has(columns, bit) for bit in (BOUNDARY, EXCHANGE, TRANSPORT, REVERSIBLE)),
        elements, has(columns, FORMULA), np.clip(columns.charge / 4.0, -10.0, 10.0), has(columns, CHARGE),
        _one_hot(columns.ec, 7), _one_hot(columns.cofactor, 16), _one_hot(columns.gas, 9),
        np.log1p(indegree) * reaction, np.log1p(outdegree) * reaction, np.log1p(np.minimum(largest, 1000.0)) * reaction,
        fractional & reaction,
        columns.ec > 0, has(columns, GENE), has(columns, UPTAKE), has(columns, BLOCKED), mass,
    ]  # fmt: skip
    return np.concatenate([np.asarray(p, np.float32).reshape(n, -1) for p in parts], axis=1)
