"""Balances of a metabolic network, as differentiable violations that are zero on a network that satisfies them.

Every violation is relative: squared imbalance over squared turnover, so it lies in [0, 1] and has no unit. S [E] holds
one signed stoichiometric coefficient per edge, negative at substrates and 0 at edges that do not join a metabolite and
a reaction.
"""

import dataclasses

import torch

from astrobiogen.models.graph.inputs import REACTION, GraphTensors, segment_max, segment_mean, segment_sum

SOURCE_TOLERANCE = 1e-6  # relative squared imbalance below which a reaction of the input counts as balanced
TINY = 1e-12  # keeps 0/0 at 0; turnovers are of order 1


@dataclasses.dataclass(frozen=True)
class Network:
    """The fixed part of a batch of networks: which edge joins what, and what may be checked.

    Attributes:
        metabolite: int64 [E] node index of the metabolite end.
        reaction: int64 [E] node index of the reaction end.
        sign: float [E] −1 at substrates, +1 at products, from the edge's direction; 0 at any other edge.
        irreversible: bool [N] reaction nodes that run forwards only.
        element_checked: bool [N] reactions whose participants all have formulas and that balance in the input.
        charge_checked: bool [N] the same for charges.
    """

    metabolite: torch.Tensor
    reaction: torch.Tensor
    sign: torch.Tensor
    irreversible: torch.Tensor
    element_checked: torch.Tensor
    charge_checked: torch.Tensor


def network_of(graph: GraphTensors) -> Network:
    """Read the network off a batch of graphs.

    Reactions that do not balance in the input themselves (biomass, exchange with the outside, lumped reactions) are
    not checked: asking a decoded network to balance what nature's own record does not balance would teach it something
    false.
    """
    is_reaction = graph.node_type == REACTION
    starts, ends = is_reaction[graph.source], is_reaction[graph.target]
    joins = starts != ends
    metabolite = torch.where(starts, graph.target, graph.source)
    reaction = torch.where(starts, graph.source, graph.target)
    sign = joins * torch.where(starts, 1.0, -1.0).to(graph.stoichiometry.dtype)
    nodes = graph.x.shape[0]
    reversible = segment_max(torch.where(joins, graph.edge_attr[:, 1].float(), 0.0)[:, None], reaction, nodes)[:, 0]
    stoichiometry = graph.stoichiometry * joins

    def checked(known: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        unknown = segment_sum((joins & ~known[metabolite]).float(), reaction, nodes)
        imbalance, turnover = _imbalance(stoichiometry, content, metabolite, reaction, nodes)
        balanced = (imbalance <= SOURCE_TOLERANCE * turnover) & (turnover > 0)
        return is_reaction & (unknown == 0) & balanced

    return Network(
        metabolite=metabolite,
        reaction=reaction,
        sign=sign,
        irreversible=is_reaction & ~(reversible > 0.5),
        element_checked=checked(graph.formula_known, graph.elements),
        charge_checked=checked(graph.charge_known, graph.charge[:, None]),
    )


def normalise_flux(flux: torch.Tensor, graph: GraphTensors) -> torch.Tensor:
    """Flux [N] scaled to root mean square 1 over each graph's reactions, 0 at metabolites: never all 0."""
    flux = torch.where(graph.node_type == REACTION, flux, 0.0)
    reactions = segment_sum((graph.node_type == REACTION).float(), graph.graph_of_node, graph.n_graphs)
    square = segment_sum(flux.square(), graph.graph_of_node, graph.n_graphs) / reactions.clamp(min=1.0)
    return flux * (square + TINY).rsqrt()[graph.graph_of_node]


def mass_balance_violation(
    stoichiometry: torch.Tensor, flux: torch.Tensor, network: Network, graph: GraphTensors
) -> torch.Tensor:
    """Steady state of internal metabolites, S v = 0: sum of (S v)² over internal metabolites / sum of (|S| |v|)².

    Args:
        stoichiometry: float [E] signed.
        flux: float [N], read at reaction nodes.
        network: of the batch.
        graph: of the batch; `is_internal` says what must balance.

    Returns:
        float [B] in [0, 1]; 0 for a graph without internal metabolites.
    """
    flow = stoichiometry * flux.index_select(0, network.reaction)
    nodes = graph.x.shape[0]
    internal = graph.is_internal.to(flow.dtype)
    net = segment_sum(flow, network.metabolite, nodes) * internal
    gross = segment_sum(flow.abs(), network.metabolite, nodes) * internal
    return _ratio_per_graph(net.square(), gross.square(), graph)


def element_balance_violation(stoichiometry: torch.Tensor, network: Network, graph: GraphTensors) -> torch.Tensor:
    """Atoms in = atoms out, over C H N O P S Fe Mg; mean over a graph's checked reactions, [B] in [0, 1]."""
    return _content_violation(stoichiometry, graph.elements, network.element_checked, network, graph)


def charge_balance_violation(stoichiometry: torch.Tensor, network: Network, graph: GraphTensors) -> torch.Tensor:
    """Charge in = charge out per checked reaction; mean over a graph's checked reactions, [B] in [0, 1]."""
    return _content_violation(stoichiometry, graph.charge[:, None], network.charge_checked, network, graph)


def reversibility_violation(flux: torch.Tensor, network: Network, graph: GraphTensors) -> torch.Tensor:
    """Share of squared flux that runs backwards through irreversible reactions, [B] in [0, 1]."""
    backward = torch.where(network.irreversible, flux.clamp(max=0.0), 0.0)
    at_reactions = torch.where(graph.node_type == REACTION, flux, 0.0)
    return _ratio_per_graph(backward.square(), at_reactions.square(), graph)


def violations(
    stoichiometry: torch.Tensor, flux: torch.Tensor, network: Network, graph: GraphTensors
) -> dict[str, torch.Tensor]:
    """All four violations of a decoded network by name, [B] each."""
    return {
        "mass_balance": mass_balance_violation(stoichiometry, flux, network, graph),
        "element_balance": element_balance_violation(stoichiometry, network, graph),
        "charge_balance": charge_balance_violation(stoichiometry, network, graph),
        "reversibility": reversibility_violation(flux, network, graph),
    }


def _imbalance(
    stoichiometry: torch.Tensor, content: torch.Tensor, metabolite: torch.Tensor, reaction: torch.Tensor, nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per reaction node: squared net content and squared turnover, summed over the content's columns; [N] each."""
    amount = stoichiometry[:, None] * content.index_select(0, metabolite)
    net = segment_sum(amount, reaction, nodes)
    gross = segment_sum(amount.abs(), reaction, nodes)
    return net.square().sum(1), gross.square().sum(1)


def _content_violation(
    stoichiometry: torch.Tensor, content: torch.Tensor, checked: torch.Tensor, network: Network, graph: GraphTensors
) -> torch.Tensor:
    imbalance, turnover = _imbalance(stoichiometry, content, network.metabolite, network.reaction, graph.x.shape[0])
    return segment_mean(imbalance / (turnover + TINY), graph.graph_of_node, graph.n_graphs, checked)


def _ratio_per_graph(numerator: torch.Tensor, denominator: torch.Tensor, graph: GraphTensors) -> torch.Tensor:
    top = segment_sum(numerator, graph.graph_of_node, graph.n_graphs)
    bottom = segment_sum(denominator, graph.graph_of_node, graph.n_graphs)
    return top / (bottom + TINY)
