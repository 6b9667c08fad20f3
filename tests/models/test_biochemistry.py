"""The balances: zero on a network that satisfies them, positive and differentiable where it does not."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix
from torch_geometric.data import Batch, Data

from astrobiogen import data as bundled
from astrobiogen.models import GraphVAEConfig, RebuiltGraphVAE
from astrobiogen.models.graph.biochemistry import Network, network_of, normalise_flux, violations
from astrobiogen.models.graph.inputs import GraphTensors, graph_tensors

# Combustion of methane in three reactions with exchange of every species:
#   R0: CH4 + 2 O2 -> CO2 + 2 H2O, R1: -> CH4, R2: -> O2, R3: CO2 ->, R4: H2O ->   and   R5: H2O -> H+ + OH- (charge)
METABOLITES = ("CH4", "O2", "CO2", "H2O", "H+", "OH-")
ATOMS = {"CH4": (1, 4, 0), "O2": (0, 0, 2), "CO2": (1, 0, 2), "H2O": (0, 2, 1), "H+": (0, 1, 0), "OH-": (0, 1, 1)}
CHARGES = {"H+": 1.0, "OH-": -1.0}
REACTIONS = (
    {"CH4": -1.0, "O2": -2.0, "CO2": 1.0, "H2O": 2.0},
    {"CH4": 1.0},
    {"O2": 1.0},
    {"CO2": -1.0},
    {"H2O": -1.0},
    {"H2O": -1.0, "H+": 1.0, "OH-": 1.0},
)
STEADY = (1.0, 1.0, 2.0, 1.0, 2.0, 0.0)


def network() -> Data:
    nodes = len(METABOLITES) + len(REACTIONS)
    edges, amounts = [], []
    for index, reaction in enumerate(REACTIONS):
        for name, amount in reaction.items():
            pair = (METABOLITES.index(name), len(METABOLITES) + index)
            edges.append(pair if amount < 0 else pair[::-1])
            amounts.append(amount)
    elements = torch.zeros(nodes, 8)
    charge = torch.zeros(nodes)
    for index, name in enumerate(METABOLITES):
        carbon, hydrogen, oxygen = ATOMS[name]
        elements[index, :2] = torch.tensor([carbon, hydrogen])
        elements[index, 3] = oxygen
        charge[index] = CHARGES.get(name, 0.0)
    is_metabolite = torch.arange(nodes) < len(METABOLITES)
    stoichiometry = torch.tensor(amounts)
    return Data(
        x=torch.randn(nodes, 64),
        edge_index=torch.tensor(edges).t().contiguous(),
        edge_attr=torch.stack([stoichiometry, torch.zeros(len(amounts))], dim=1),
        stoichiometry=stoichiometry,
        node_type=(~is_metabolite).long(),
        is_internal=is_metabolite,
        elements=elements,
        formula_known=is_metabolite,
        charge=charge,
        charge_known=is_metabolite,
    )


def prepared(*items: Data) -> GraphTensors:
    return graph_tensors(Batch.from_data_list(list(items)), 64, 16, 8)


def flux_of(graph: GraphTensors, values: tuple[float, ...]) -> torch.Tensor:
    flux = torch.zeros(graph.x.shape[0])
    flux[graph.node_type == 1] = torch.tensor(values * graph.n_graphs)
    return flux


def test_balanced_network_has_no_violation() -> None:
    graph = prepared(network(), network())
    fixed = network_of(graph)
    flux = normalise_flux(flux_of(graph, STEADY), graph)
    for name, value in violations(graph.stoichiometry, flux, fixed, graph).items():
        assert value.shape == (2,)
        assert value.abs().max() < 1e-12, name


def test_signs_follow_the_direction_of_the_edges() -> None:
    graph = prepared(network())
    fixed = network_of(graph)
    assert torch.equal(fixed.sign, graph.stoichiometry.sign())


def test_only_reactions_that_balance_in_the_input_are_checked() -> None:
    graph = prepared(network())
    reactions = graph.node_type == 1
    fixed = network_of(graph)
    assert fixed.element_checked[reactions].tolist() == [True, False, False, False, False, True]
    assert fixed.charge_checked[reactions].tolist() == [False] * 5 + [True]  # the others carry no charge at all
    unknown = network()
    unknown.formula_known[METABOLITES.index("OH-")] = False
    hidden = prepared(unknown)
    assert network_of(hidden).element_checked[reactions].tolist() == [True] + [False] * 5


@pytest.mark.parametrize(
    ("broken", "edge", "amount", "flux"),
    [
        ("mass_balance", None, 0.0, (1.0, 1.0, 1.0, 1.0, 2.0, 0.0)),  # half the oxygen that burns
        ("element_balance", 1, -1.0, STEADY),  # CH4 + O2 -> CO2 + 2 H2O
        ("charge_balance", -1, 2.0, STEADY),  # H2O -> H+ + 2 OH-
        ("reversibility", None, 0.0, tuple(-value for value in STEADY)),
    ],
)
def test_each_violation_sees_its_own_fault(
    broken: str, edge: int | None, amount: float, flux: tuple[float, ...]
) -> None:
    graph = prepared(network())
    fixed = network_of(graph)
    stoichiometry = graph.stoichiometry.clone()
    if edge is not None:
        stoichiometry[edge] = amount
    found = violations(stoichiometry, normalise_flux(flux_of(graph, flux), graph), fixed, graph)
    assert found[broken].item() > 1e-3
    assert all(0.0 <= value.item() <= 1.0 for value in found.values())


def test_mass_balance_value() -> None:
    graph = prepared(network())
    fixed = network_of(graph)
    flux = flux_of(graph, (1.0, 1.0, 1.0, 1.0, 2.0, 0.0))
    found = violations(graph.stoichiometry, flux, fixed, graph)["mass_balance"].item()
    # O2: +1 − 2 = −1 of turnover 3; the other species balance with turnovers 2 (CH4), 2 (CO2), 4 (H2O)
    assert found == pytest.approx(1.0 / (9.0 + 4.0 + 4.0 + 16.0))


def test_violations_are_differentiable_and_descend_to_zero() -> None:
    graph = prepared(network())
    fixed = network_of(graph)
    magnitude = (0.5 * torch.randn(len(fixed.sign))).requires_grad_()
    raw = torch.rand(graph.x.shape[0]).requires_grad_()  # forward flux: the sign of a flux is a separate basin
    optimizer = torch.optim.Adam([magnitude, raw], lr=0.05)
    totals = []
    for _ in range(150):
        optimizer.zero_grad()
        flux = normalise_flux(raw, graph)
        total = sum(violations(fixed.sign * magnitude.exp(), flux, fixed, graph).values()).sum()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert magnitude.grad is not None
    assert raw.grad is not None
    assert totals[-1] < 1e-3 < totals[0]


def test_gradients_against_finite_differences() -> None:
    graph = prepared(network())
    fixed = network_of(graph)
    stoichiometry = (fixed.sign * torch.rand(len(fixed.sign))).double().requires_grad_()
    flux = torch.randn(graph.x.shape[0], dtype=torch.float64, requires_grad=True)
    exact = GraphTensors(**{**vars(graph), "elements": graph.elements.double(), "charge": graph.charge.double()})

    def function(amounts: torch.Tensor, flows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(violations(amounts, flows, fixed, exact).values())

    assert torch.autograd.gradcheck(function, (stoichiometry, flux))


# Genome-scale models of the bundled data that record formulas and charges: 692 to 1,025 reactions.
REAL = ("BIOMD0000001092", "BIOMD0000001095", "BIOMD0000001099")


@pytest.fixture(scope="module")
def store() -> Any:
    return bundled.load_bundled().train.store


def steady_flux(graph: GraphTensors, network: Network) -> torch.Tensor:
    """A flux with S v = 0 at internal metabolites and forward through irreversible reactions: a random linear program,
    as flux-balance analysis solves."""
    nodes, reactions = graph.x.shape[0], (graph.node_type == 1).numpy()
    coefficients = graph.stoichiometry.double().numpy()
    matrix = coo_matrix((coefficients, (network.metabolite.numpy(), network.reaction.numpy())), (nodes, nodes)).tocsr()
    internal = matrix[graph.is_internal.numpy()][:, reactions]
    lowest = np.where(network.irreversible.numpy()[reactions], 0.0, -1.0)
    objective = np.random.default_rng(1).normal(size=internal.shape[1])
    solved = linprog(objective, A_eq=internal, b_eq=np.zeros(internal.shape[0]),
                     bounds=np.stack([lowest, np.ones_like(lowest)], axis=1))  # fmt: skip
    assert solved.success
    assert (np.abs(solved.x) > 1e-6).mean() > 0.1  # a network at rest would satisfy everything
    flux = torch.zeros(nodes, dtype=torch.float64)
    flux[torch.from_numpy(reactions)] = torch.from_numpy(solved.x)
    return flux


@pytest.mark.parametrize("name", REAL)
def test_a_real_network_at_steady_state_has_no_violation(store: Any, name: str) -> None:
    graph = prepared(store.organisms[name].graph)
    fixed = network_of(graph)
    reactions = graph.node_type == 1
    assert fixed.element_checked[reactions].float().mean() > 0.7
    assert fixed.charge_checked[reactions].float().mean() > 0.7
    flux = normalise_flux(steady_flux(graph, fixed), graph)
    stoichiometry = graph.stoichiometry.double().requires_grad_()
    flux.requires_grad_()
    found = violations(stoichiometry, flux, fixed, graph)
    # 1e-8: charges that the record leaves unbalanced by less than the tolerance of `network_of`
    assert all(value.item() < 1e-8 for value in found.values()), found
    wrong = violations(stoichiometry * (1.0 + 0.5 * torch.rand_like(stoichiometry)), -flux, fixed, graph)
    assert all(value.item() > 1e-4 for value in wrong.values()), wrong
    by_stoichiometry, by_flux = torch.autograd.grad(sum(wrong.values()).sum(), (stoichiometry, flux))
    assert (by_stoichiometry != 0).float().mean() > 0.7
    assert (by_flux[reactions] != 0).float().mean() > 0.7


def test_a_real_network_decoded_by_the_autoencoder_improves_in_training(store: Any) -> None:
    """The violations are those of the decoded coefficients and fluxes: they start above zero and training lowers
    them."""
    graph = store.organisms[REAL[0]].graph
    model = RebuiltGraphVAE(
        GraphVAEConfig(hidden_dim=16, latent_dim=8, num_layers=1, heads=2, global_tokens=1, edge_dim=8, dropout=0.0,
                       beta=1e-3, constraint_weight=1.0)
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    totals = []
    for _ in range(25):
        optimizer.zero_grad()
        outputs = model(graph)
        outputs["loss"].backward()
        optimizer.step()
        totals.append(sum(value.item() for value in outputs["constraints"].values()))
    assert model.decoder.to_flux.weight.grad.abs().max() > 0
    assert totals[-1] < 0.7 * totals[0]
