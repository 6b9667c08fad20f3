"""What a metabolic network is made of, in a few fixed numbers, and whether it resembles one of the training set."""

from typing import Any

import torch
from torch import nn

from astrobiogen.layers import RMSNorm
from astrobiogen.models.common import at_least_float32
from astrobiogen.models.graph.inputs import METABOLITE, REACTION, GraphTensors, segment_sum

TRUST = (0.2, 0.8)  # of a network unlike all known ones, and of a known one: neither knowledge is certain
LIMIT = 5.0  # standard deviations
WIDTH = 0.5  # of the typical distance between two neighbouring networks of the training set


class NetworkSummary(nn.Module):
    """Features [B, feature_dim] and familiarity [B] of metabolic networks from fixed descriptions of them.

    A description holds the mean features of the metabolites and of the reactions and the log counts of both. It is
    standardised over the networks that `remember` took in (the training set's), cut off at ± 5, and read by two layers.

    Familiarity is 0.2 + 0.6 exp(−(d / w)² / 2), with d the root mean square difference from the nearest remembered
    description and w half the median distance of a remembered network from its nearest other one; 1 with nothing
    remembered. It uses descriptions and not learned features, which may map what is new onto what is known. It is not 0
    or 1: what is learned of a known network need not hold on an unknown planet, and an unknown one tells something.

    What was remembered is part of the state dict, however many networks it were.

    Args:
        node_features: width of `x`.
        feature_dim: size of the features.
        dropout: between the layers, in training only.
    """

    known: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    width: torch.Tensor

    def __init__(self, node_features: int, feature_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        size = 2 * node_features + 2
        self.register_buffer("known", torch.zeros(0, size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("width", torch.ones(()))
        self.read = nn.Sequential(
            nn.Linear(size, feature_dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(feature_dim, feature_dim),
            RMSNorm(feature_dim),
        )  # fmt: skip

    @torch.no_grad()
    def remember(self, graph: GraphTensors) -> None:
        """Take in the networks of the training set, in place of those before."""
        described = _describe(graph)
        self.mean = described.mean(0)
        deviation = described.std(0, correction=0)
        self.scale = torch.where(deviation > 1e-3 * deviation.max(), deviation, torch.ones_like(deviation))
        self.known = (described - self.mean) / self.scale
        between = _distance(self.known, self.known).fill_diagonal_(torch.inf).min(1).values
        between = between[between.isfinite() & (between > 0)]
        self.width = WIDTH * between.median() if len(between) else torch.ones_like(self.width)

    def forward(self, graph: GraphTensors) -> dict[str, torch.Tensor]:
        """``summary_features`` [B, feature_dim] and ``familiarity`` [B] (fp32) of the networks in `graph`."""
        with torch.no_grad():
            described = (_describe(graph) - self.mean) / self.scale
            familiarity = described.new_ones(graph.n_graphs)
            if self.known.shape[0]:
                nearest = _distance(described, self.known).min(1).values
                likeness = (-0.5 * (nearest / self.width).square()).exp()
                familiarity = TRUST[0] + (TRUST[1] - TRUST[0]) * likeness
        features = self.read(described.clamp(-LIMIT, LIMIT).to(graph.x.dtype))
        return {"summary_features": features, "familiarity": familiarity}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for as many descriptions as the state dict holds."""
        given = state_dict.get(f"{prefix}known")
        if given is not None and given.shape[1:] == self.known.shape[1:] and given.shape != self.known.shape:
            self.known = self.known.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square difference [n, m] of the rows; exactly 0 for equal ones."""
    return (one[:, None] - other[None]).square().mean(-1).sqrt()


def _describe(graph: GraphTensors) -> torch.Tensor:
    """Description [B, 2 F + 2] of each network."""
    x = at_least_float32(graph.x)
    parts, counts = [], []
    for kind in (METABOLITE, REACTION):
        member = (graph.node_type == kind).to(x.dtype)[:, None]
        count = segment_sum(member, graph.graph_of_node, graph.n_graphs)
        parts.append(segment_sum(x * member, graph.graph_of_node, graph.n_graphs) / count.clamp(min=1.0))
        counts.append(count.log1p())
    return torch.cat(parts + counts, dim=1)
