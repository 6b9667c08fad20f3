"""Variational autoencoder of metabolic networks."""

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.layers import Linear, RMSNorm, SwiGLU
from astrobiogen.models.common import CountsUpdates, at_least_float32, maybe_checkpoint, require, resolve_config
from astrobiogen.models.graph.attention import (
    GlobalPool,
    GraphLayer,
    StructuralEmbedding,
    laplacian_products,
    node_structure,
)
from astrobiogen.models.graph.biochemistry import network_of, normalise_flux, violations
from astrobiogen.models.graph.inputs import GraphTensors, graph_tensors, missing_chemistry, segment_mean, segment_sum
from astrobiogen.models.original.names import GRAPH_NAMES, takes_original_names

SMALLEST_COEFFICIENT = 1e-6  # stoichiometric coefficients below this count as this in log space


@takes_original_names(GRAPH_NAMES)
@dataclasses.dataclass(frozen=True)
class GraphVAEConfig:
    """Sizes and switches of `RebuiltGraphVAE`.

    Attributes:
        node_features: width of `x`.
        hidden_dim: node width inside.
        latent_dim: size of z.
        num_layers: encoder blocks.
        heads: attention heads; divides `hidden_dim`.
        global_tokens: pooled tokens per graph in every block and in the readout.
        laplacian_dim: Laplacian eigenvectors per node.
        random_walk_dim: random-walk lengths per node.
        edge_dim: width of the edge decoder's end-point vectors.
        dropout: in training only.
        use_biochemical_constraints: decode fluxes and add the balances of `models.biochemistry` to the loss.
        beta: weight of the KL divergence (per latent dimension).
        beta_warmup_steps: optimizer updates over which the weight rises linearly from 0 to `beta`; 0: `beta` from the
            start. Evaluation always takes `beta`.
        constraint_weight: weight of the summed violations.
        use_gradient_checkpointing: recompute each block in the backward pass.
    """

    node_features: int = 64
    hidden_dim: int = 512
    latent_dim: int = 256
    num_layers: int = 6
    heads: int = 16
    global_tokens: int = 4
    laplacian_dim: int = 16
    random_walk_dim: int = 8
    edge_dim: int = 64
    dropout: float = 0.1
    use_biochemical_constraints: bool = True
    beta: float = 1.0
    beta_warmup_steps: int = 1000
    constraint_weight: float = 0.1
    use_gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(self.hidden_dim % self.heads == 0, f"heads = {self.heads} must divide hidden_dim = {self.hidden_dim}")
        for name in (
            "node_features",
            "latent_dim",
            "num_layers",
            "global_tokens",
            "laplacian_dim",
            "random_walk_dim",
            "edge_dim",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("beta", "beta_warmup_steps", "constraint_weight"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")


class RebuiltGraphVAE(CountsUpdates, nn.Module):
    """Graph -> (mu, logvar) -> z -> nodes, directed edges, stoichiometry and fluxes.

    Encoder: `num_layers` blocks of attention along the edges (both directions told apart, biased by stoichiometry,
    reversibility and Laplacian products) plus global tokens per graph: cost linear in nodes and edges, any graph size,
    graphs never mix.

    Decoder: conditioned on z and on the structural encodings of each node slot. An edge u -> v has the score
    a_u·b_v + structure, which is not symmetric. Negatives are type-correct: the target of another edge of the same
    graph and direction; in training drawn at random, in evaluation a fixed rule of the edge's place within its graph.
    Real edges hit by accident are left out.

    The weight of the KL divergence is warmed up over optimizer updates: whoever trains calls `after_update` behind each
    (`astrobiogen.training` does), so accumulating micro-batches changes nothing. The count is the buffer `beta_steps`,
    part of the state dict: a resumed run goes on where it was.

    Args:
        config: a `GraphVAEConfig`; default `GraphVAEConfig()`.
        **overrides: any of its fields.

    Raises:
        TypeError: an override is no field of `GraphVAEConfig`.
        ValueError: sizes do not fit together.
    """

    beta_steps: torch.Tensor

    def __init__(self, config: GraphVAEConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = resolve_config(GraphVAEConfig, config, overrides)
        self.config = config
        width = config.hidden_dim
        self.embed_nodes = Linear(config.node_features, width, bias=False)
        self.embed_structure = StructuralEmbedding(width, config.laplacian_dim, config.random_walk_dim)
        self.attribute_bias = Linear(2, 2 * config.num_layers * config.heads)
        self.laplacian_bias = Linear(config.laplacian_dim, 2 * config.num_layers * config.heads, bias=False)
        self.layers = nn.ModuleList(
            GraphLayer(width, config.heads, config.global_tokens, config.dropout) for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(width)
        self.readout_pool = GlobalPool(width, config.global_tokens)
        self.readout = nn.Linear((config.global_tokens + 1) * width, width)
        self.readout_norm = RMSNorm(width)
        self.to_mu = nn.Linear(width, config.latent_dim)
        self.to_logvar = nn.Linear(width, config.latent_dim)
        self.decoder = GraphDecoder(config)
        if config.beta_warmup_steps:
            self.register_buffer("beta_steps", torch.zeros((), dtype=torch.long))
        self._told_of_chemistry = not config.use_biochemical_constraints

    @property
    def feature_dim(self) -> int:
        """Width of ``features``."""
        return self.config.hidden_dim

    def forward(self, data: Any, beta: float | None = None) -> dict[str, Any]:
        """Encode, sample (training) or take the mean (evaluation), decode, and score.

        Args:
            data: `torch_geometric` `Batch` (or `Data`), see `graph_tensors`.
            beta: weight of the KL divergence for this call; default the configured one, warmed up in training.

        Returns:
            ``features`` [B, hidden_dim], ``mu``, ``logvar``, ``z`` [B, latent_dim], ``node_reconstruction`` [N, F],
            ``edge_logits`` [E] of the given edges, ``negative_edge_index`` [2, E], ``negative_edge_logits`` [E] and
            ``negative_edge_mask`` [E] (which of them are absent edges and count),
            ``constraints`` (name -> [B]; empty when off), and per graph [B]: ``node_loss``, ``edge_loss``,
            ``stoichiometry_loss``, ``kl`` (nats per latent dimension), ``loss_per_sample``; ``loss`` their mean and
            ``beta`` (the weight in force).
        """
        config = self.config
        graph = graph_tensors(data, config.node_features, config.laplacian_dim, config.random_walk_dim)
        if not self._told_of_chemistry and not torch.compiler.is_compiling() and (lack := missing_chemistry(data)):
            self._told_of_chemistry = True
            warnings.warn(lack, stacklevel=2)
        products = laplacian_products(graph, graph.source, graph.target)
        structure = node_structure(graph)
        features = self._encode(graph, structure, products)
        mu, logvar = self.to_mu(features), self.to_logvar(features)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp() if self.training else mu
        outputs: dict[str, Any] = {"features": features, "mu": mu, "logvar": logvar, "z": z}
        outputs |= self.decoder(z, graph, structure, products)
        mean, log_variance = at_least_float32(mu), at_least_float32(logvar)
        outputs["kl"] = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean(1)
        loss = outputs["node_loss"] + outputs["edge_loss"] + outputs["stoichiometry_loss"]
        outputs["beta"] = self._beta() if beta is None else beta
        loss = loss + outputs["beta"] * outputs["kl"]
        for violation in outputs["constraints"].values():
            loss = loss + config.constraint_weight * violation
        return outputs | {"loss_per_sample": loss, "loss": loss.mean()}

    def after_update(self) -> None:
        """Move the warm-up of the KL divergence on by one optimizer update."""
        if self.config.beta_warmup_steps:
            self.beta_steps += 1

    def _beta(self) -> torch.Tensor | float:
        """Weight of the KL divergence in force."""
        if not self.training or not self.config.beta_warmup_steps:
            return self.config.beta
        return self.config.beta * (self.beta_steps / self.config.beta_warmup_steps).clamp(max=1.0)

    def _encode(self, graph: GraphTensors, structure: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        """Graph features [B, hidden_dim]."""
        config = self.config
        both_ways = torch.cat([graph.target, graph.source]), torch.cat([graph.source, graph.target])
        edges = ops.edge_lists(*both_ways, graph.x.shape[0])
        biases = self.attribute_bias(graph.edge_attr) + self.laplacian_bias(products)
        biases = (
            biases.view(-1, 2, config.num_layers, config.heads).permute(2, 1, 0, 3).flatten(1, 2)
        )  # [L, 2 E, heads]
        x = self.embed_nodes(graph.x) + self.embed_structure(structure)
        for layer, bias in zip(self.layers, biases.unbind(0)):
            x = maybe_checkpoint(
                config.use_gradient_checkpointing, layer, x, edges, bias, graph.graph_of_node, graph.n_graphs
            )
        x = self.final_norm(x)
        pooled = self.readout_pool(x, graph.graph_of_node, graph.n_graphs)
        mean = segment_mean(x, graph.graph_of_node, graph.n_graphs)
        return self.readout_norm(self.readout(torch.cat([pooled, mean], dim=-1)))


class GraphDecoder(nn.Module):
    """z and structure -> node features, directed edges, coefficients, fluxes; and the losses against the input."""

    def __init__(self, config: GraphVAEConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.from_latent = nn.Linear(config.latent_dim, width)
        self.embed_structure = StructuralEmbedding(width, config.laplacian_dim, config.random_walk_dim)
        self.norm = RMSNorm(width)
        self.mlp = SwiGLU(width, 2 * width)
        self.to_nodes = Linear(width, config.node_features)
        self.to_ends = Linear(width, 2 * config.edge_dim)
        self.edge_structure = Linear(config.laplacian_dim, 1)
        self.to_magnitude = Linear(config.edge_dim, 1)
        if config.use_biochemical_constraints:
            self.to_flux = Linear(width, 1)

    def forward(
        self, z: torch.Tensor, graph: GraphTensors, structure: torch.Tensor, products: torch.Tensor
    ) -> dict[str, Any]:
        """Decode z [B, latent_dim] on the node slots of `graph`; see `RebuiltGraphVAE.forward` for the entries."""
        slots = self.from_latent(z).index_select(0, graph.graph_of_node) + self.embed_structure(structure)
        slots = slots + self.mlp(self.norm(slots))
        nodes = self.to_nodes(slots)
        starts, ends = self.to_ends(slots).chunk(2, dim=-1)
        logits, pairs = self._edge_logits(starts, ends, graph.source, graph.target, products)
        sources, targets, absent = sample_negatives(graph, self.training)
        negative_products = laplacian_products(graph, sources, targets)
        negatives, _ = self._edge_logits(starts, ends, sources, targets, negative_products)
        log_magnitude = at_least_float32(self.to_magnitude(pairs)[:, 0])
        return {
            "node_reconstruction": nodes,
            "edge_logits": logits,
            "negative_edge_index": torch.stack([sources, targets]),
            "negative_edge_logits": negatives,
            "negative_edge_mask": absent,
            "node_loss": segment_mean(
                at_least_float32(nodes - graph.x).square().mean(1), graph.graph_of_node, graph.n_graphs
            ),
            "edge_loss": _edge_loss(logits, negatives, absent, graph, sources),
            "stoichiometry_loss": _stoichiometry_loss(log_magnitude, graph),
            "constraints": self._constraints(slots, logits, log_magnitude, graph),
        }

    def _edge_logits(
        self,
        starts: torch.Tensor,
        ends: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        products: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = starts.index_select(0, source) * ends.index_select(0, target)
        logits = pairs.sum(-1) + self.edge_structure(products)[:, 0]
        return at_least_float32(logits), pairs

    def _constraints(
        self, slots: torch.Tensor, logits: torch.Tensor, log_magnitude: torch.Tensor, graph: GraphTensors
    ) -> dict[str, torch.Tensor]:
        """Balances of the decoded network: coefficient = ± edge probability · magnitude, flux from the slots."""
        if not self.config.use_biochemical_constraints:
            return {}
        network = network_of(graph)
        decoded = logits.sigmoid() * log_magnitude.clamp(max=10.0).exp()
        flux = normalise_flux(at_least_float32(self.to_flux(slots)[:, 0]), graph)
        return violations(network.sign * decoded, flux, network, graph)


def sample_negatives(graph: GraphTensors, random: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One candidate for an absent edge per present edge: same source, target of another edge of the same graph and
    target type.

    Within such a group of n edges the i-th takes the target of edge (i + shift) mod n, 1 <= shift < n: random in
    training, else a fixed function of i, so the result of a graph depends on neither the call nor its neighbours in
    the batch.

    Args:
        graph: the batch.
        random: draw the shifts from PyTorch's generator.

    Returns:
        (sources, targets, absent): int64 [E] each and bool [E], False where the candidate is an edge after all.
    """
    groups = graph.graph_of_node[graph.target] * 2 + graph.node_type[graph.target]
    order = torch.argsort(groups, stable=True)
    sizes = segment_sum(torch.ones_like(groups), groups, 2 * graph.n_graphs)
    starts = sizes.cumsum(0) - sizes
    size, start = sizes[groups[order]], starts[groups[order]]
    place = torch.arange(order.shape[0], device=order.device) - start
    if random:
        shift = 1 + (torch.rand(order.shape[0], device=order.device) * (size - 1)).long()
    else:
        shift = 1 + (place * 2_654_435_761) % (size - 1).clamp(min=1)  # Knuth's multiplicative hash constant
    sources = graph.source[order]
    targets = graph.target[order][start + (place + shift) % size]
    nodes = graph.x.shape[0]
    keys = (graph.source * nodes + graph.target).sort().values
    candidates = sources * nodes + targets
    found = torch.searchsorted(keys, candidates).clamp(max=max(keys.shape[0] - 1, 0))
    return sources, targets, (keys[found] != candidates) & (size > 1)


def _edge_loss(
    logits: torch.Tensor, negatives: torch.Tensor, counts: torch.Tensor, graph: GraphTensors, sources: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy per graph: mean over present edges plus mean over absent ones, halved."""
    owner = graph.graph_of_node
    present = segment_mean(F.softplus(-logits), owner[graph.source], graph.n_graphs)
    absent = segment_mean(F.softplus(negatives), owner[sources], graph.n_graphs, counts)
    return 0.5 * (present + absent)


def _stoichiometry_loss(log_magnitude: torch.Tensor, graph: GraphTensors) -> torch.Tensor:
    """Smooth L1 distance of log |S| per graph, over the edges whose coefficient is known."""
    target = graph.stoichiometry.abs().clamp(min=SMALLEST_COEFFICIENT).log()
    losses = F.smooth_l1_loss(log_magnitude, target, reduction="none")
    return segment_mean(losses, graph.graph_of_node[graph.source], graph.n_graphs, graph.stoichiometry != 0)
