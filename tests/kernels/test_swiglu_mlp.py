"""The SwiGLU block as one op: the shared battery, random shapes, memory, one answer for any thread count, bad input."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.swiglu_mlp.reference import swiglu_mlp as plain
from astrobiogen.kernels.swiglu_mlp.samples import CASES, LONG_CASES, block
from astrobiogen.testing import check_battery, check_op

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")
OPS = ("swiglu_mlp", "swiglu_mlp_backward")
NAMES = ("x", "gate_weight", "up_weight", "down_weight")


@pytest.fixture(autouse=True, scope="module", params=("intel", "other"))
def core(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test by the rules of every core: they choose between products."""
    found = extension.cpu_core()
    extension.set_cpu_core(request.param)
    yield
    extension.set_cpu_core(found)


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_battery(case: Case) -> None:
    def call(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor) -> Any:
        return plain(x, gate_weight, up_weight, down_weight)

    check_battery(ops.swiglu_mlp, call, case, ops=OPS, implementations=("cpu",))


@st.composite
def blocks(draw: st.DrawFn) -> Case:
    hidden, inner = draw(st.integers(8, 50)), draw(st.integers(8, 50))
    rows = draw(st.integers(64, 70)) + (1 << 17) // (hidden * inner)  # always enough for the own kernel
    return Case("any", block(rows, hidden, inner=inner), NAMES)


@hypothesis.settings(max_examples=15)
@hypothesis.given(case=blocks(), seed=st.integers(0, 2**31))
def test_any_shape(case: Case, seed: int) -> None:
    def call(**arguments: torch.Tensor) -> torch.Tensor:
        return plain(*(arguments[name] for name in NAMES))

    assert check_op(ops.swiglu_mlp, call, case, torch.float32, ops=OPS, implementation="cpu", seed=seed)


def _arguments(rows: int, hidden: int, inner: int) -> dict[str, torch.Tensor]:
    maker = TensorMaker(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(3))
    return {name: tensor.requires_grad_() for name, tensor in block(rows, hidden, inner=inner)(maker).items()}


def test_thread_count_changes_no_bit_of_the_own_kernel() -> None:
    extension.set_cpu_core("other")
    arguments = _arguments(1500, 45, 70)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = ops.swiglu_mlp(**arguments)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(arguments.values()))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_no_call_copies_the_weights() -> None:
    """One row through a large block reads the weights where they lie: copying them would take longer than the block."""
    hidden, inner = 256, 1024
    x, gate, up, down = (
        torch.randn(*shape) for shape in ((1, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.swiglu_mlp(x, gate, up, down)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < allocated <= 16 * 4 * inner


def test_only_gate_and_up_are_kept() -> None:
    """The composition keeps gate, up and their product, [rows, inner] each."""
    arguments, kept = _arguments(600, 32, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.swiglu_mlp(**arguments)
    weights = 3 * 32 * 64
    assert sum(kept) == 600 * 32 + 2 * 600 * 64 + weights


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"gate_weight must have shape \[I, 3\].*got \(5, 4\)"),
        (
            {"up_weight": torch.zeros(4, 5)},
            ValueError,
            r"up_weight must have shape \(5, 4\) \(the shape",
        ),
        ({"down_weight": torch.zeros(5, 4)}, ValueError, r"down_weight must have shape \(4, 5\)"),
        ({"up_weight": torch.zeros(5, 4, dtype=torch.int32)}, TypeError, r"up_weight must be float32"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 4), "gate_weight": torch.zeros(5, 4), "up_weight": torch.zeros(5, 4)}
    with pytest.raises(error, match=message):
        ops.swiglu_mlp(**(good | {"down_weight": torch.zeros(4, 5)} | changes))
