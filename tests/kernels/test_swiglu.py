"""SwiGLU, separate and packed: the shared battery, shapes at random, layouts, what it saves, and bad input."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.swiglu import reference
from astrobiogen.kernels.swiglu.samples import CASES, PACKED_CASES
from astrobiogen.kernels.swiglu.triton_kernels import TILE, tile_of
from astrobiogen.testing import check_battery, check_op, route

OPS = ("swiglu", "swiglu_backward")
PACKED_OPS = ("swiglu_packed", "swiglu_packed_backward")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_swiglu_battery(case: Case) -> None:
    check_battery(ops.swiglu, reference.swiglu, case, ops=OPS)


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda case: case.name)
def test_swiglu_packed_battery(case: Case) -> None:
    check_battery(ops.swiglu_packed, reference.swiglu_packed, case, ops=PACKED_OPS)


@st.composite
def layouts(draw: st.DrawFn, largest: int) -> tuple[list[int], list[int], list[int]]:
    """(shape, order of the axes in memory, slack behind each axis in memory) of a strided tensor."""
    shape = draw(st.lists(st.integers(1, largest), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    slack = draw(st.lists(st.integers(0, 2), min_size=len(shape), max_size=len(shape)))
    return shape, list(order), slack


def strided(make: TensorMaker, shape: list[int], order: list[int], slack: list[int]) -> torch.Tensor:
    """A tensor of `shape` whose axes lie in memory in `order`, each followed by unused elements."""
    memory = make.randn(*(shape[axis] + slack[axis] for axis in order))
    back = [order.index(axis) for axis in range(len(shape))]
    return memory.permute(back)[tuple(slice(size) for size in shape)]


@hypothesis.given(layout=layouts(9), other=st.randoms(use_true_random=False), seed=st.integers(0, 2**31))
def test_any_layout_on_the_cpu(layout: tuple[list[int], list[int], list[int]], other, seed: int) -> None:
    shape, order, slack = layout
    order_up = other.sample(order, len(order))

    def build(make: TensorMaker) -> dict[str, torch.Tensor]:
        return {"gate": strided(make, shape, order, slack), "up": strided(make, shape, order_up, slack)}

    case = Case("any", build, ("gate", "up"))
    assert check_op(ops.swiglu, reference.swiglu, case, torch.float32, ops=OPS, seed=seed)


@hypothesis.settings(max_examples=6)
@hypothesis.given(layout=layouts(5), seed=st.integers(0, 2**31))
def test_any_layout_in_triton(layout: tuple[list[int], list[int], list[int]], seed: int) -> None:
    shape, order, slack = layout

    def build(make: TensorMaker) -> dict[str, torch.Tensor]:
        return {"gate": strided(make, shape, order, slack), "up": make.randn(*shape)}

    case = Case("any", build, ("gate", "up"))
    assert check_op(ops.swiglu, reference.swiglu, case, torch.float32, ops=OPS, implementation="triton", seed=seed)


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_backward_recomputes_the_product(implementation: str) -> None:
    grad, gate, up = torch.randn(3, 4, 37).unbind(0)
    with route(("swiglu", "swiglu_backward", "swiglu_backward_product"), implementation):
        grad_gate, grad_up, product = torch.ops.astrobiogen.swiglu_backward_product(grad, gate, up)
        expected = torch.ops.astrobiogen.swiglu_backward(grad, gate, up)
        forward = torch.ops.astrobiogen.swiglu(gate, up)
    assert torch.equal(grad_gate, expected[0])
    assert torch.equal(grad_up, expected[1])
    # the compiler may contract the two functions' products differently: one rounding
    torch.testing.assert_close(product, forward, rtol=2e-7, atol=1e-12)


def test_packed_equals_separate() -> None:
    gate_up, grad = torch.randn(5, 3, 94), torch.randn(5, 3, 47)
    halves = gate_up.chunk(2, dim=-1)
    assert torch.equal(ops.swiglu_packed(gate_up), ops.swiglu(*halves))
    packed = torch.ops.astrobiogen.swiglu_packed_backward(grad, gate_up)
    assert torch.equal(packed, torch.cat(torch.ops.astrobiogen.swiglu_backward(grad, *halves), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [2**21 + 3, 2**21 + 8])
def test_large_outputs_written_past_the_cache_are_the_same(columns: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, columns, dtype=dtype).unbind(0)
    whole = ops.swiglu(gate, up)
    parts = [ops.swiglu(a, b) for a, b in zip(gate.split(99_999), up.split(99_999))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=2e-7 if dtype == torch.float32 else 0.0, atol=1e-12)


def test_a_scalar_is_a_tensor_of_one_element() -> None:
    gate, up = torch.tensor(0.5), torch.tensor(-2.0)
    torch.testing.assert_close(ops.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_far_negative_gates_keep_their_relative_accuracy() -> None:
    gate = torch.tensor([-60.0, -87.0, -88.5, -90.0, -95.0, -1000.0])
    exact = gate.double() * torch.exp(gate.double())
    result = ops.swiglu(gate, torch.ones(6))
    # fp32 subnormals end at 1.4e-45; one of their steps is the absolute floor
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1.4e-43)


def test_only_the_inputs_are_saved() -> None:
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.swiglu(gate, up)
    assert {tensor.data_ptr() for tensor in saved} == {gate.data_ptr(), up.data_ptr()}


def test_second_derivative_is_refused() -> None:
    gate, up = (torch.randn(3, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(ops.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu_backward has no second derivative"):
        first.sum().backward()


@hypothesis.given(columns=st.integers(1, 100_000))
def test_tiles_are_whole_warps(columns: int) -> None:
    tile, warps = tile_of(columns)
    assert tile & (tile - 1) == 0
    assert tile % 32 == 0
    assert tile <= TILE
    assert warps in (1, 2, 4)
    assert tile >= min(columns, TILE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": [1.0]}, TypeError, r"gate must be a torch\.Tensor, got list"),
        ({"up": None}, TypeError, r"up must be a torch\.Tensor, got NoneType"),
        ({"gate": torch.ones(2, 8, dtype=torch.int32)}, TypeError, r"gate must be float32.*got torch\.int32"),
        (
            {"up": torch.ones(2, 8).half()},
            TypeError,
            r"up must have the dtype of gate, torch\.float32, got torch\.float16",
        ),
        ({"up": torch.ones(2, 7)}, ValueError, r"up must have shape \(2, 8\) \(the shape of gate\), got \(2, 7\)"),
        ({"up": torch.ones(8)}, ValueError, r"up must have shape \(2, 8\).*got \(8,\)"),
        ({"up": torch.ones(2, 8, device="meta")}, ValueError, r"up must be on the device of gate, cpu, got meta"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.swiglu(**{"gate": torch.ones(2, 8), "up": torch.ones(2, 8), **arguments})


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.ones(2, 7), ValueError, r"gate_up must have shape \[\.\.\., 2 I\] with an even last axis, got \(2, 7\)"),
        (torch.ones(()), ValueError, r"gate_up must have shape .* got \(\)"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"gate_up must be float32.*got torch\.int64"),
    ],
)
def test_bad_packed_input_is_named(gate_up: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.swiglu_packed(gate_up)
