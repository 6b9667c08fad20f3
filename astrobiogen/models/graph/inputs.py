"""The tensors of a batch of metabolic graphs, checked once, with stand-ins for attributes a graph does not have."""

import dataclasses
from typing import Any

import torch

from astrobiogen.kernels.values import has_values, require_range
from astrobiogen.models.common import check_axes

METABOLITE, REACTION = 0, 1
N_ELEMENTS = 8  # C H N O P S Fe Mg
CHEMISTRY = ("stoichiometry", "node_type", "is_internal")  # what the balances of a network are made of


@dataclasses.dataclass(frozen=True)
class GraphTensors:
    """B graphs with N nodes and E directed edges in all; an edge runs substrate -> reaction or reaction -> product.

    Attributes:
        x: float [N, F] node features.
        source: int64 [E] start node of each edge.
        target: int64 [E] end node.
        edge_attr: float [E, 2]: signed log-scaled stoichiometry, 1 for a reversible reaction.
        stoichiometry: float [E], negative at substrates; 0 where unknown.
        node_type: int64 [N], `METABOLITE` or `REACTION`.
        laplacian_pe: float [N, K1] eigenvectors of the graph Laplacian (sign-free use only).
        random_walk_pe: float [N, K2] return probabilities.
        is_internal: bool [N], metabolites that must balance.
        elements: float [N, 8] atoms per molecule.
        formula_known: bool [N].
        charge: float [N] in elementary charges.
        charge_known: bool [N].
        graph_of_node: int64 [N].
        n_graphs: B.
    """

    x: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    edge_attr: torch.Tensor
    stoichiometry: torch.Tensor
    node_type: torch.Tensor
    laplacian_pe: torch.Tensor
    random_walk_pe: torch.Tensor
    is_internal: torch.Tensor
    elements: torch.Tensor
    formula_known: torch.Tensor
    charge: torch.Tensor
    charge_known: torch.Tensor
    graph_of_node: torch.Tensor
    n_graphs: int


def graph_tensors(data: Any, node_features: int, laplacian_dim: int, random_walk_dim: int) -> GraphTensors:
    """Read a `torch_geometric` `Data` or `Batch`.

    Only `x` and `edge_index` are required. Missing position encodings, edge attributes and chemistry become zeros or
    False, which switches the terms that need them off for those graphs; nothing is made up.

    Args:
        data: the graphs.
        node_features: expected width of `x`.
        laplacian_dim: expected width of `laplacian_pe`.
        random_walk_dim: expected width of `random_walk_pe`.

    Raises:
        ValueError: an axis has the wrong size, or an edge points outside the nodes.
    """
    x, edge_index = data.x, data.edge_index
    check_axes("metabolic_graph.x", x, ("node", "feature"), {"feature": node_features})
    check_axes("metabolic_graph.edge_index", edge_index, ("end", "edge"), {"end": 2})
    nodes, edges = x.shape[0], edge_index.shape[1]
    graph_of_node = getattr(data, "batch", None)
    if graph_of_node is None:
        graph_of_node = torch.zeros(nodes, dtype=torch.long, device=x.device)
        n_graphs = 1
    else:
        n_graphs = int(data.num_graphs)
    check_axes("metabolic_graph.batch", graph_of_node, ("node",), {"node": nodes})

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype, axes: tuple[str, ...]) -> torch.Tensor:
        value = getattr(data, name, None)
        if value is None:
            return torch.zeros(shape, dtype=dtype, device=x.device)
        check_axes(f"metabolic_graph.{name}", value, axes, dict(zip(axes, shape)))
        return value.to(dtype)

    real = x.dtype
    exact = torch.promote_types(real, torch.float32)
    graph = GraphTensors(
        x=x,
        source=edge_index[0],
        target=edge_index[1],
        edge_attr=read("edge_attr", (edges, 2), real, ("edge", "attribute")),
        stoichiometry=read("stoichiometry", (edges,), exact, ("edge",)),
        node_type=read("node_type", (nodes,), torch.long, ("node",)),
        laplacian_pe=read("laplacian_pe", (nodes, laplacian_dim), real, ("node", "eigenvector")),
        random_walk_pe=read("random_walk_pe", (nodes, random_walk_dim), real, ("node", "step")),
        is_internal=read("is_internal", (nodes,), torch.bool, ("node",)),
        elements=read("elements", (nodes, N_ELEMENTS), exact, ("node", "element")),
        formula_known=read("formula_known", (nodes,), torch.bool, ("node",)),
        charge=read("charge", (nodes,), exact, ("node",)),
        charge_known=read("charge_known", (nodes,), torch.bool, ("node",)),
        graph_of_node=graph_of_node,
        n_graphs=n_graphs,
    )
    if has_values(edge_index):
        checked = (("edge_index", edge_index, nodes), ("node_type", graph.node_type, 2))
        for name, index, count in checked:
            require_range(
                index, count, lambda got, n=name, c=count: f"metabolic_graph.{n}: got {got}, expected 0 to {c - 1}"
            )
    return graph


def missing_chemistry(data: Any) -> str:
    """What a batch of graphs lacks for its balances to say anything, as a sentence; empty: nothing."""
    missing = [name for name in CHEMISTRY if getattr(data, name, None) is None]
    if not missing:
        return ""
    return (
        f"metabolic_graph carries no {', '.join(missing)}: its biochemical constraints are zero and teach nothing "
        "(use_biochemical_constraints=False leaves them out)"
    )


def segment_sum(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of the rows of `values` [M, ...] that share an `index` [M], as [size, ...]."""
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def segment_mean(
    values: torch.Tensor, index: torch.Tensor, size: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the rows of `values` [M, ...] that share an `index` and, if given, are in `mask` (bool [M]); 0 where
    there is none.

    Rows are masked and not picked: no shape depends on values, so `torch.compile` sees one graph and no GPU is waited
    for.
    """
    weights = torch.ones_like(index, dtype=values.dtype) if mask is None else mask.to(values.dtype)
    shape = (-1, *([1] * (values.dim() - 1)))
    kept = values if mask is None else values * weights.view(shape)
    return segment_sum(kept, index, size) / segment_sum(weights, index, size).clamp(min=1.0).view(shape)


def segment_max(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Maximum of the rows of `values` [M, K] that share an `index`; −inf where there is none. No gradient."""
    values = values.detach()
    start = values.new_full((size, values.shape[1]), float("-inf"))
    return start.scatter_reduce(0, index[:, None].expand_as(values), values, "amax")
