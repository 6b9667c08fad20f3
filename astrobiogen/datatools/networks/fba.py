"""Flux balance: maximise c.v subject to S v = 0 and bounds, by scipy's HiGHS."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.sparse

from astrobiogen.data.networks import features
from astrobiogen.datatools.networks.assemble import Network

GROWTH_THRESHOLD = 1e-6  # 1/h; only "grows or not" is used, since published objectives are scaled differently


def growth(network: Network, closed_gases: tuple[str, ...] = ()) -> float:
    """Optimal value of the model's own objective with uptake of ``closed_gases`` set to zero; 0.0 when infeasible or
    without objective.
    """
    m, r = network.metabolites, network.lower.size
    source, target = network.edge_index
    consumed = network.stoichiometry < 0
    met = np.where(consumed, source, target)
    rxn = np.where(consumed, target, source) - m
    internal = ~features.has(network.columns, features.BOUNDARY)[:m]
    matrix = scipy.sparse.csr_matrix((network.stoichiometry, (met, rxn)), shape=(m, r))[internal]
    lower, upper = network.lower.copy(), network.upper.copy()
    for gas in closed_gases:
        hit = network.exchange_gas == features.GASES.index(gas) + 1
        lower[hit & (network.uptake_sign < 0)] = np.maximum(lower[hit & (network.uptake_sign < 0)], 0.0)
        upper[hit & (network.uptake_sign > 0)] = np.minimum(upper[hit & (network.uptake_sign > 0)], 0.0)
    if not network.objective.any() or (lower > upper).any():
        return 0.0
    result = scipy.optimize.linprog(
        -network.objective,
        A_eq=matrix,
        b_eq=np.zeros(matrix.shape[0]),
        bounds=np.stack([lower, upper], axis=1),
        method="highs",
    )
    return float(-result.fun) if result.status == 0 else 0.0
