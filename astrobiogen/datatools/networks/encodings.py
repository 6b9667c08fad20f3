"""Positional encodings of a bipartite graph: Laplacian eigenvectors and random-walk return probabilities."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

# just below the spectrum [0, 2], so that the shifted matrix is definite and the smallest eigenvalues converge first
SHIFT = -1e-3
TRIVIAL = 1e-8
NEAR = 0.999  # of the largest entry: counts as a tie
BLOCK = 1024  # columns of P^k at a time: 8 N BLOCK bytes instead of 8 N^2 (34 GB at the largest network that packs)


def _adjacency(edge_index: NDArray[np.int64], n: int) -> scipy.sparse.csr_matrix:
    matrix = scipy.sparse.coo_matrix((np.ones(edge_index.shape[1]), tuple(edge_index)), shape=(n, n)).tocsr()
    matrix = matrix + matrix.T
    matrix.data[:] = 1.0
    return matrix


def laplacian_encoding(edge_index: NDArray[np.int64], n: int, width: int) -> NDArray[np.float64]:
    """Eigenvectors [N, width] of I - D^-1/2 A D^-1/2 to the smallest eigenvalues above 1e-8, zero columns when there
    are fewer.

    Each column is v -> sign(v) sqrt(|v| / max |v|), the first of the largest entries positive: the low eigenvectors
    sit on pendant pathways (mean |v| is 0.5 % of the peak), the root keeps the rest of the network visible in 8 bits.
    Fixed start vector: equal input gives equal output. Eigenvectors of equal eigenvalues (one zero per component) are
    any basis of their space; the zeros are left out.
    """
    adjacency = _adjacency(edge_index, n)
    degree = np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)
    half = scipy.sparse.diags(degree**-0.5)
    laplacian = (scipy.sparse.eye(n) - half @ adjacency @ half).tocsc()
    components, _ = scipy.sparse.csgraph.connected_components(adjacency)
    wanted = min(width + components, n - 2)
    out = np.zeros((n, width))
    if wanted < 1:
        return out
    start = np.random.default_rng(0).standard_normal(n)
    values, vectors = scipy.sparse.linalg.eigsh(laplacian, k=wanted, sigma=SHIFT, which="LM", v0=start)
    order = np.argsort(values, kind="stable")
    keep = order[values[order] > TRIVIAL][:width]
    chosen = vectors[:, keep]
    size = np.abs(chosen)
    # the first of the largest entries: in a symmetric network two of opposite sign tie, and rounding must not choose
    first = (size >= NEAR * size.max(axis=0)).argmax(axis=0)
    scaled = chosen * np.sign(chosen[first, np.arange(chosen.shape[1])]) / size.max(axis=0)
    out[:, : chosen.shape[1]] = np.sign(scaled) * np.sqrt(np.abs(scaled))
    return out


def random_walk_encoding(edge_index: NDArray[np.int64], n: int, width: int) -> NDArray[np.float64]:
    """Return probabilities [N, width] of the undirected random walk after 2, 4, ..., 2 * width steps (odd ones are 0:
    bipartite).

    diag(P^2k) needs only P^k, since the walk is reversible: (P^2k)_ii = sum_j (P^k)_ij (P^k)_ji = sum_j (P^k)_ij^2 d_i
    / d_j.
    """
    adjacency = _adjacency(edge_index, n)
    degree = np.maximum(np.asarray(adjacency.sum(axis=1)).ravel(), 1.0)
    step = scipy.sparse.csr_matrix(scipy.sparse.diags(1.0 / degree) @ adjacency, dtype=np.float32)
    step.sort_indices()  # a fixed order of the float32 sums
    out = np.zeros((n, width))
    for start in range(0, n, BLOCK):
        columns = slice(start, start + BLOCK)
        power = step[:, columns].toarray()
        for k in range(width):
            out[:, k] += (power.astype(np.float64) ** 2) @ (1.0 / degree[columns])
            power = step @ power
    return np.clip(degree[:, None] * out, 0.0, 1.0)
