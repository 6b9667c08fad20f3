"""Attention along edges: the shared battery, graphs at random, order and isolation of nodes, and bad input."""

import itertools
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.edge_attention.samples import CASES, LONG_CASES, edge_attention, graph, plain
from astrobiogen.testing import check_battery, check_op
from astrobiogen.testing._routes import Implementation, device_of, route

OPS = ("edge_attention", "edge_attention_backward")


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_battery(case: Case) -> None:
    check_battery(edge_attention, plain, case, ops=OPS)


@st.composite
def graphs(draw: st.DrawFn, largest: int) -> Case:
    sizes = [draw(st.integers(1, largest)) for _ in range(2)]
    heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    edges = draw(st.integers(0, 3 * largest))
    return Case("any", graph(sizes[0], edges, heads, width, senders=sizes[1]), ("q", "k", "v", "bias"))


@hypothesis.given(case=graphs(30), seed=st.integers(0, 2**31))
def test_any_graph_on_the_cpu(case: Case, seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert check_op(edge_attention, plain, case, dtype, ops=OPS, seed=seed)


@hypothesis.settings(max_examples=6)
@hypothesis.given(case=graphs(6), seed=st.integers(0, 2**31))
def test_any_graph_in_triton(case: Case, seed: int) -> None:
    assert check_op(edge_attention, plain, case, torch.float32, ops=OPS, implementation="triton", seed=seed)


def test_equals_masked_attention() -> None:
    """A complete graph is plain attention; absent edges are a mask."""
    nodes, heads, width = 7, 2, 8
    q, k, v = torch.randn(3, nodes, heads, width).unbind(0)
    table = torch.randn(heads, nodes, nodes)
    allowed = torch.rand(nodes, nodes) < 0.5
    allowed[3] = False
    receiver, sender = allowed.nonzero().unbind(1)
    out = ops.edge_attention(q, k, v, table[:, receiver, sender].t(), ops.edge_lists(receiver, sender, nodes))
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    mask = table.masked_fill(~allowed, float("-inf"))[None]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)[0].transpose(0, 1)
    assert torch.equal(out[3], torch.zeros(heads, width))
    keep = torch.arange(nodes) != 3
    torch.testing.assert_close(out[keep], expected[keep])


@pytest.mark.parametrize(
    ("heads", "width", "implementation"), [(4, 8, "cpu"), (3, 5, "cpu"), (4, 8, "triton")]
)  # fmt: skip
def test_slopes_of_alike_neighbours_cancel(heads: int, width: int, implementation: Implementation) -> None:
    """The slopes of a node add up to 0; where rows are alike, what rounding leaves of that adds up over the nodes."""
    nodes = 2000 if implementation == "cpu" else 40
    device = device_of(implementation, "cpu")

    def sums(leaves: list[torch.Tensor], grad: torch.Tensor, edges: ops.EdgeLists) -> torch.Tensor:
        out = ops.edge_attention(*leaves, edges)
        grad_q, grad_bias = torch.autograd.grad(out, (leaves[0], leaves[3]), grad)
        return torch.cat([grad_q.double().sum(0).flatten(), grad_bias.double().sum(0)])

    ours, eager = 0.0, 0.0
    for degree, spread in itertools.product((2, 3, 5), (0.01, 0.001)):
        receiver = torch.arange(nodes).repeat(degree)
        edges = ops.edge_lists(receiver.to(device), torch.randint(0, nodes, (degree * nodes,)).to(device), nodes)
        rows = (torch.randn(4, 1, heads, width) + spread * torch.randn(4, nodes, heads, width)).to(device)
        bias = spread * torch.randn(degree * nodes, heads).to(device)
        *leaves, grad = *rows[:3].unbind(0), bias, rows[3]
        single, double = ([t.to(dtype).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.float64))
        with astrobiogen.use_kernels("reference"):
            exact, plain_sums = sums(double, grad.double(), edges), sums(single, grad, edges)
        with route(OPS, implementation):
            found = sums(single, grad, edges)
        ours += (found - exact).norm().item()
        eager += (plain_sums - exact).norm().item()
    assert ours <= eager, (ours, eager)


def test_thread_count_changes_no_bit() -> None:
    case = graph(500, 2600, 4, 8)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(3)
            arguments = case(TensorMaker(torch.float32, torch.device("cpu"), generator))
            leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v", "bias")]
            out = edge_attention(**arguments)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def _call(**changes: object) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        edges = ops.edge_lists(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 3)
        arguments = {name: torch.zeros(3, 2, 4) for name in "qkv"} | {"bias": torch.zeros(3, 2), "edges": edges}
        return ops.edge_attention(**(arguments | changes))  # pyright: ignore[reportArgumentType]

    return call


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_call(q=torch.zeros(3, 8)), ValueError, r"q must have shape \[nodes, heads, D\], got \(3, 8\)"),
        (_call(q=torch.zeros(3, 2, 4, dtype=torch.int64)), TypeError, r"q must be float32.*got torch\.int64"),
        (_call(k=torch.zeros(3, 3, 4)), ValueError, r"k must have shape \(3, 2, 4\)"),
        (_call(v=torch.zeros(4, 2, 4)), ValueError, r"v must have shape \(3, 2, 4\) \(the shape of k\)"),
        (_call(bias=torch.zeros(2, 2)), ValueError, r"bias must have shape \(3, 2\) \(\[edges, heads\]\)"),
        (_call(bias=torch.zeros(3, 2).bfloat16()), TypeError, r"bias must have the dtype of q"),
        (_call(q=torch.zeros(5, 2, 4)), ValueError, r"edges\.receiver_start must have shape \(6,\)"),
        (_call(scale=float("nan")), ValueError, r"scale must be a finite number, got nan"),
        (
            lambda: ops.edge_lists(torch.tensor([0, 3]), torch.tensor([0, 1]), 3),
            ValueError,
            r"receiver must be in \[0, 3\), got values from 0 to 3",
        ),
        (
            lambda: ops.edge_lists(torch.tensor([0, 1]), torch.tensor([-1, 1]), 3),
            ValueError,
            r"sender must be in \[0, 3\), got values from -1 to 1",
        ),
        (
            lambda: ops.edge_lists(torch.tensor([0, 1]), torch.tensor([1]), 3),
            ValueError,
            r"sender must have shape \(2,\)",
        ),
        (
            lambda: ops.edge_lists(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, 0]), 3),
            TypeError,
            r"receiver must be int64, got torch\.int32",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
