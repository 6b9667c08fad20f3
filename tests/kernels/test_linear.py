"""The narrow linear layer: the shared battery, shapes at random, one answer for any thread count, and bad input."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

from astrobiogen import ops, use_kernels
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.linear.reference import linear as plain
from astrobiogen.kernels.linear.samples import CASES, LONG_CASES, layer
from astrobiogen.layers import Linear
from astrobiogen.testing import check_battery, check_op

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")
OPS = ("linear", "linear_backward")


@pytest.fixture(autouse=True, scope="module", params=("intel", "other"))
def core(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test by the rules of every core: they choose between products."""
    found = extension.cpu_core()
    extension.set_cpu_core(request.param)
    yield
    extension.set_cpu_core(found)


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_battery(case: Case) -> None:
    check_battery(ops.linear, plain, case, ops=OPS, implementations=("cpu",), dtypes=(torch.float32,))


@st.composite
def layers(draw: st.DrawFn) -> Case:
    inputs, outputs = draw(st.integers(1, 70)), draw(st.integers(8, 70))
    rows = draw(st.integers(64, 70)) + (1 << 17) // (inputs * outputs)  # always enough for the own kernel
    bias = draw(st.booleans())
    names = ("x", "weight", "bias") if bias else ("x", "weight")
    return Case("any", layer(rows, inputs, outputs=outputs, bias=bias), names)


@hypothesis.settings(max_examples=25)
@hypothesis.given(case=layers(), seed=st.integers(0, 2**31))
def test_any_shape(case: Case, seed: int) -> None:
    assert check_op(ops.linear, plain, case, torch.float32, ops=OPS, implementation="cpu", seed=seed)


def test_thread_count_changes_no_bit_of_the_own_kernel() -> None:
    extension.set_cpu_core("other")
    arguments = layer(1000, 45, outputs=70, bias=True)(
        TensorMaker(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(3))
    )
    leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = ops.linear(**arguments)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_everything_but_fp32_is_pytorchs() -> None:
    x, weight, bias = torch.randn(128, 32), torch.randn(64, 32), torch.randn(64)
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [tensor.to(dtype) for tensor in (x, weight, bias)]
        assert torch.equal(ops.linear(*tensors), F.linear(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    with use_kernels("reference"):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))


def test_function_transforms_work() -> None:
    x, weight = torch.randn(128, 32), torch.randn(64, 32)
    (expected,) = torch.autograd.grad(F.linear(x, weight.requires_grad_()).square().sum(), weight)
    found = torch.func.grad(lambda w: ops.linear(x, w).square().sum())(weight.detach())
    torch.testing.assert_close(found, expected)


def test_the_layer_is_nn_linear() -> None:
    torch.manual_seed(5)
    theirs = torch.nn.Linear(32, 64)
    torch.manual_seed(5)
    ours = Linear(32, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    x = torch.randn(3, 60, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[\.\.\., K\], got \(\)"),
        ({"x": torch.zeros(2, 3)}, ValueError, r"weight must have shape \[N, 3\].*got \(5, 4\)"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, r"x must be float32.*got torch\.int64"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\) \(\[N\], the rows of weight\)"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.linear(**({"x": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "bias": None} | changes))
