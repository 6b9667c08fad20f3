"""Graph transformer blocks whose cost is linear in nodes and edges: attention along edges, and global tokens."""

import torch
from torch import nn

from astrobiogen import ops
from astrobiogen.layers import Linear, RMSNorm, SwiGLU
from astrobiogen.layers.children import globally_hooked, is_plain
from astrobiogen.layers.linear import LINEAR
from astrobiogen.models.common import at_least_float32
from astrobiogen.models.graph.inputs import METABOLITE, REACTION, GraphTensors, segment_max, segment_sum


class EdgeAttention(nn.Module):
    """Multi-head attention in which a node attends to its neighbours, along and against the edges.

    score(i <- j, head) = q_i·k_j / sqrt(d) + bias(edge, direction, head); softmax over the neighbours of i; a node
    without neighbours receives 0. Graphs of a batch share no edge, so they cannot mix.

    Args:
        hidden_dim: node width.
        heads: divides `hidden_dim`.
    """

    def __init__(self, hidden_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(hidden_dim, hidden_dim, bias=False)
        self.kv_proj = Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.o_proj = Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor, edges: ops.EdgeLists, bias: torch.Tensor) -> torch.Tensor:
        """Attend: x [N, C]; `edges` hold every edge once per direction, M in all; bias [M, heads]."""
        nodes, width = x.shape
        q = self.q_proj(x).view(nodes, self.heads, -1)
        k, v = self.kv_proj(x).view(nodes, 2, self.heads, -1).unbind(1)
        return self.o_proj(ops.edge_attention(q, k, v, bias, edges).view(nodes, width))


class GlobalPool(nn.Module):
    """`slots` learned attention poolings per graph: softmax over a graph's nodes of a linear score, then the weighted
    mean.

    Args:
        hidden_dim: node width C.
        slots: number of poolings.
    """

    def __init__(self, hidden_dim: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.score = Linear(hidden_dim, slots, bias=False)  # a softmax ignores a bias

    def forward(self, x: torch.Tensor, graph_of_node: torch.Tensor, n_graphs: int) -> torch.Tensor:
        """Pool x [N, C] into [B, slots · C]; 0 for a graph without nodes."""
        scores = at_least_float32(self.score(x))
        highest = segment_max(scores, graph_of_node, n_graphs)
        weights = (scores - highest.index_select(0, graph_of_node)).exp()
        total = segment_sum(weights, graph_of_node, n_graphs).clamp(min=torch.finfo(torch.float32).tiny)
        weighted = weights.to(x.dtype)[..., None] * x[:, None]
        pooled = segment_sum(weighted, graph_of_node, n_graphs) / total.to(x.dtype)[..., None]
        return pooled.flatten(1)


class GraphLayer(nn.Module):
    """Pre-norm block: attention along edges, exchange with the graph's global tokens, SwiGLU.

    Args:
        hidden_dim: node width.
        heads: attention heads.
        slots: global tokens per graph.
        dropout: on every branch, in training.
    """

    def __init__(self, hidden_dim: int, heads: int, slots: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_dim)
        self.attention = EdgeAttention(hidden_dim, heads)
        self.pool = GlobalPool(hidden_dim, slots)
        self.broadcast = Linear(slots * hidden_dim, hidden_dim)
        self.mlp_norm = RMSNorm(hidden_dim)
        self.mlp = SwiGLU(hidden_dim, 2 * hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        edges: ops.EdgeLists,
        bias: torch.Tensor,
        graph_of_node: torch.Tensor,
        n_graphs: int,
    ) -> torch.Tensor:
        """Map node states [N, C] to [N, C]; arguments as in `EdgeAttention` and `GlobalPool`."""
        normed = self.attention_norm(x)
        tokens = self.broadcast(self.pool(normed, graph_of_node, n_graphs))
        branch = self.attention(normed, edges, bias) + tokens.index_select(0, graph_of_node)
        normed, x = self.mlp_norm(self.dropout(branch), x)
        return x + self.dropout(self.mlp(normed))


class StructuralEmbedding(nn.Module):
    """Node embedding of structure alone: |Laplacian eigenvectors| (their sign is arbitrary), random-walk returns,
    node type.

    Args:
        hidden_dim: width of the embedding.
        laplacian_dim: eigenvectors per node.
        random_walk_dim: walk lengths per node.
    """

    def __init__(self, hidden_dim: int, laplacian_dim: int, random_walk_dim: int) -> None:
        super().__init__()
        self.widths = (laplacian_dim, random_walk_dim)
        self.laplacian = Linear(laplacian_dim, hidden_dim, bias=False)
        self.random_walk = Linear(random_walk_dim, hidden_dim, bias=False)
        self.node_types = nn.Embedding(2, hidden_dim)

    def forward(self, structure: torch.Tensor) -> torch.Tensor:
        """Embed the nodes, [N, hidden_dim], from `node_structure`: the three tables side by side are one product."""
        linear = is_plain(self.laplacian, LINEAR) and is_plain(self.random_walk, LINEAR)
        if linear and is_plain(self.node_types, (nn.Embedding,)) and not globally_hooked():
            tables = (self.laplacian.weight, self.random_walk.weight, self.node_types.weight.t())
            return ops.linear(structure, torch.cat(tables, dim=1))
        vectors, walks, kinds = structure.split([*self.widths, 2], dim=1)
        return self.laplacian(vectors) + self.random_walk(walks) + self.node_types(kinds[:, 1].long())


def node_structure(graph: GraphTensors) -> torch.Tensor:
    """What a node is apart from its features, [N, K1 + K2 + 2]: |Laplacian eigenvectors|, random-walk returns, node
    type as two columns of 0 and 1."""
    kinds = torch.stack([graph.node_type == METABOLITE, graph.node_type == REACTION], dim=1)
    return torch.cat([graph.laplacian_pe.abs(), graph.random_walk_pe, kinds.to(graph.x.dtype)], dim=1)


def laplacian_products(graph: GraphTensors, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """u_k(source) · u_k(target) for every eigenvector k, [M, K]: unchanged when an eigenvector flips its sign."""
    return graph.laplacian_pe.index_select(0, source) * graph.laplacian_pe.index_select(0, target)
