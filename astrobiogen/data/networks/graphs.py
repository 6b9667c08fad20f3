"""Packed metabolic networks and their PyTorch Geometric form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.data.networks import features, geometric
from astrobiogen.data.storage.container import Contents

if TYPE_CHECKING:
    from torch_geometric.data import Data

LAPLACIAN_DIM, RANDOM_WALK_DIM = 16, 8
Array = NDArray[Any]


def pack_graph(
    columns: features.NodeColumns,
    metabolites: int,
    edge_index: NDArray[np.int64],
    stoichiometry: NDArray[np.float64],
    laplacian: NDArray[np.float64],
    random_walk: NDArray[np.float64],
) -> dict[str, Array]:
    """Arrays of a container file for one network.

    Args:
        columns, metabolites, edge_index, stoichiometry: Those of a network; edges must be grouped by
            reaction in ascending order.
        laplacian: [N, 16] in [-1, 1]; kept in steps of 1/127.
        random_walk: [N, 8], return probabilities in [0, 1]; kept in steps of 1/255.
    """
    source, target = edge_index
    met, rxn = np.where(stoichiometry < 0, source, target), np.where(stoichiometry < 0, target, source) - metabolites
    counts = np.bincount(rxn, minlength=columns.flags.size - metabolites)
    return {
        "flags": columns.flags,
        "compartments": columns.compartments,
        "elements": columns.elements[:metabolites],
        "charge": columns.charge[:metabolites],
        "ec": columns.ec[metabolites:],
        "cofactor": columns.cofactor[:metabolites],
        "gas": columns.gas,
        "participants": counts.astype(np.uint16),
        "metabolite": met.astype(np.uint16),
        "stoichiometry": stoichiometry.astype(np.float32),
        "laplacian": np.round(laplacian * 127.0).astype(np.int8),
        "random_walk": np.round(random_walk * 255.0).astype(np.uint8),
    }


def unpack_graph(contents: Contents) -> Data:
    """PyG ``Data`` of one network, as the batch layout documents it (``x`` [N, 64], ``edge_index`` [2, E], ...).

    Raises:
        DataError: An array is absent or has a wrong shape or dtype, the network is empty, or an edge points outside it.
    """
    flags = contents.get("flags", (None,), "uint16")
    reaction = (flags & features.REACTION) != 0
    n, m = flags.size, int((~reaction).sum())
    r = n - m
    metabolite = contents.get("metabolite", (None,), "uint16").astype(np.int64)
    e = metabolite.size
    if m == 0 or r == 0 or e == 0:
        raise DataError(contents.path, "metabolite", f"empty graph ({m} metabolites, {r} reactions, {e} edges)")
    if reaction[:m].any():
        raise DataError(contents.path, "flags", "metabolites must come before reactions")
    participants = contents.get("participants", (r,), "uint16").astype(np.int64)
    if participants.sum() != e or metabolite.max() >= m:
        raise DataError(
            contents.path, "participants", f"edges do not fit: {participants.sum()} listed, {e} stored, {m} metabolites"
        )
    stoichiometry = contents.get("stoichiometry", (e,), "float32")
    if not np.isfinite(stoichiometry).all() or not stoichiometry.all():
        raise DataError(contents.path, "stoichiometry", "holds zero or non-finite values")
    columns = features.NodeColumns(
        flags,
        contents.get("compartments", (n,), "uint8"),
        _padded(contents.get("elements", (m, 8), "uint16"), n),
        _padded(contents.get("charge", (m,), "int8"), n),
        _led(contents.get("ec", (r,), "uint8"), n),
        _padded(contents.get("cofactor", (m,), "uint8"), n),
        contents.get("gas", (n,), "uint8"),
    )
    owner = np.repeat(np.arange(r, dtype=np.int64), participants) + m
    edge_index = np.where(stoichiometry < 0, np.stack([metabolite, owner]), np.stack([owner, metabolite]))
    return _data(contents, columns, edge_index, stoichiometry, owner, m)


def _padded(values: Array, n: int) -> Array:
    return np.concatenate([values, np.zeros((n - len(values), *values.shape[1:]), values.dtype)])


def _led(values: Array, n: int) -> Array:
    return np.concatenate([np.zeros(n - len(values), values.dtype), values])


def _data(
    contents: Contents,
    columns: features.NodeColumns,
    edge_index: NDArray[np.int64],
    stoichiometry: NDArray[np.float32],
    owner: NDArray[np.int64],
    metabolites: int,
) -> Data:
    n = columns.flags.size
    x = features.node_features(columns, edge_index, stoichiometry)
    reversible = features.has(columns, features.REVERSIBLE)[owner]
    scaled = np.sign(stoichiometry) * np.log1p(np.abs(stoichiometry))
    exchanged = np.zeros(n, bool)
    touches = features.has(columns, features.EXCHANGE)[owner]
    exchanged[np.where(stoichiometry < 0, edge_index[0], edge_index[1])[touches]] = True
    is_metabolite = np.arange(n) < metabolites
    internal = is_metabolite & ~exchanged & ~features.has(columns, features.BOUNDARY)
    laplacian = contents.get("laplacian", (n, LAPLACIAN_DIM), "int8").astype(np.float32) / 127.0
    walk = contents.get("random_walk", (n, RANDOM_WALK_DIM), "uint8").astype(np.float32) / 255.0
    return geometric.graph(
        x=torch.from_numpy(x),
        edge_index=torch.from_numpy(edge_index),
        edge_attr=torch.from_numpy(np.stack([scaled, reversible], axis=1).astype(np.float32)),
        stoichiometry=torch.from_numpy(stoichiometry),
        node_type=torch.from_numpy((~is_metabolite).astype(np.int64)),
        laplacian_pe=torch.from_numpy(laplacian),
        random_walk_pe=torch.from_numpy(walk),
        is_internal=torch.from_numpy(internal),
        elements=torch.from_numpy(columns.elements.astype(np.float32)),
        formula_known=torch.from_numpy(features.has(columns, features.FORMULA)),
        charge=torch.from_numpy(columns.charge.astype(np.float32)),
        charge_known=torch.from_numpy(features.has(columns, features.CHARGE)),
        num_nodes=n,
    )
