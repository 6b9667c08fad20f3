"""One SBML file to packed arrays and flux-balance answers; runs in worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from astrobiogen.data.errors import DataError
from astrobiogen.data.networks.graphs import LAPLACIAN_DIM, RANDOM_WALK_DIM, pack_graph
from astrobiogen.datatools.networks import cobra_json, encodings, fba, sbml
from astrobiogen.datatools.networks.assemble import NONE, Network


@dataclass(frozen=True)
class PackedNetwork:
    """Arrays of the container file, sizes, and growth with open medium, without O2, and without O2 and H2."""

    arrays: dict[str, NDArray[Any]]
    metabolites: int
    reactions: int
    edges: int
    growth: float
    growth_without_o2: float
    growth_without_o2_h2: float


def read_network(path: Path) -> Network:
    """One network from SBML (``.xml``, ``.sbml``) or cobra JSON (``.json``), plain or ``.gz``, by its suffix."""
    return (cobra_json if ".json" in path.suffixes else sbml).read_network(path)


def encode_network(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of the container file of one network: what a model reads of it; its growth is not asked for.

    Raises:
        DataError: The file is bad, or the network too large for its 16-bit numbers.
    """
    return _encoded(path, read_network(path))


def _encoded(path: Path, network: Network) -> dict[str, NDArray[Any]]:
    n = network.columns.flags.size
    if n > 65535:
        raise DataError(path, "", f"{n} nodes, at most 65,535 can be packed")
    laplacian = encodings.laplacian_encoding(network.edge_index, n, LAPLACIAN_DIM)
    walk = encodings.random_walk_encoding(network.edge_index, n, RANDOM_WALK_DIM)
    return pack_graph(network.columns, network.metabolites, network.edge_index, network.stoichiometry, laplacian, walk)


def pack_network(path: Path) -> PackedNetwork:
    """Read, solve and encode one network.

    Raises:
        DataError: As ``encode_network``, or the network is without an objective: nothing says what growth would be.
    """
    network = read_network(path)
    if network.objective_source == NONE:
        raise DataError(path, "objective", "absent, and no reaction is called biomass or growth")
    arrays = _encoded(path, network)
    growth = fba.growth(network)
    closed = fba.growth(network, ("o2",)) if growth > fba.GROWTH_THRESHOLD else 0.0
    strict = fba.growth(network, ("o2", "h2")) if closed > fba.GROWTH_THRESHOLD else 0.0
    return PackedNetwork(
        arrays,
        network.metabolites,
        network.columns.flags.size - network.metabolites,
        network.stoichiometry.size,
        growth,
        closed,
        strict,
    )
