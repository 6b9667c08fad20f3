"""RMSNorm and residual + RMSNorm: the shared battery, shapes at random, what makes them special, and bad input."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.rms_norm import reference
from astrobiogen.kernels.rms_norm.samples import CASES, LONG_CASES, with_residual
from astrobiogen.kernels.rms_norm.triton_kernels import column_tiles
from astrobiogen.testing import check_battery, check_op

NORM_OPS = ("rms_norm", "rms_norm_backward")
ADD_OPS = ("add_rms_norm", "rms_norm_backward")
RESIDUAL_CASES = tuple(with_residual(case) for case in CASES)


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_rms_norm_battery(case: Case) -> None:
    check_battery(ops.rms_norm, reference.rms_norm, case, ops=NORM_OPS)


@pytest.mark.parametrize("case", RESIDUAL_CASES, ids=lambda case: case.name)
def test_add_rms_norm_battery(case: Case) -> None:
    check_battery(ops.add_rms_norm, reference.add_rms_norm, case, ops=ADD_OPS)


@hypothesis.given(rows=st.integers(0, 40), hidden=st.integers(1, 600), seed=st.integers(0, 2**31))
def test_any_shape_on_the_cpu(rows: int, hidden: int, seed: int) -> None:
    case = Case("any", lambda make: {"x": make.randn(rows, hidden), "weight": make.randn(hidden)}, ("x", "weight"))
    assert check_op(ops.rms_norm, reference.rms_norm, case, torch.float32, ops=NORM_OPS, seed=seed)


@hypothesis.settings(max_examples=10)
@hypothesis.given(rows=st.integers(1, 5), hidden=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_any_shape_in_triton(rows: int, hidden: int, seed: int) -> None:
    case = Case(
        "any",
        lambda make: {
            "x": make.randn(rows, hidden),
            "residual": make.randn(rows, hidden),
            "weight": make.randn(hidden),
        },
        ("x", "residual", "weight"),
    )
    assert check_op(
        ops.add_rms_norm, reference.add_rms_norm, case, torch.float32, ops=ADD_OPS, implementation="triton", seed=seed
    )


@hypothesis.given(hidden=st.integers(1, 16384))
def test_column_tiles_cover_each_column_once(hidden: int) -> None:
    tiles = [tile for tile in column_tiles(hidden) if tile]
    assert all(tile & (tile - 1) == 0 for tile in tiles)
    assert sum(tiles[:-1]) < hidden <= sum(tiles), "only the last tile may be masked"
    # at worst a last tile one column over a power of two: 2 * 16384 - 1 would be the single power-of-two tile
    assert sum(tiles) < 1.5 * hidden + 16


def test_flagship_width_has_no_masked_lane() -> None:
    assert column_tiles(4352) == (4096, 256, 0)
    assert column_tiles(5120) == (4096, 1024, 0)


def test_equals_torch_rms_norm_in_fp64() -> None:
    x, weight = torch.randn(7, 129, dtype=torch.float64), torch.randn(129, dtype=torch.float64)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (129,), weight, 1e-5), rtol=1e-13, atol=1e-13
    )


def test_the_sum_is_what_eager_addition_gives() -> None:
    x, residual, weight = (torch.randn(5, 72, dtype=torch.bfloat16) for _ in range(3))
    y, total = ops.add_rms_norm(x, residual, weight[0])
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total, weight[0]))


def test_gradient_through_the_sum_alone_and_through_both() -> None:
    leaves = [torch.randn(4, 40, requires_grad=True) for _ in range(2)]
    weight = torch.randn(40, requires_grad=True)
    upstream = torch.randn(4, 40)
    _, total = ops.add_rms_norm(*leaves, weight)
    total.backward(upstream)
    assert all(torch.equal(leaf.grad, upstream) for leaf in leaves if leaf.grad is not None)
    assert weight.grad is None, "the weight does not reach the sum"


@pytest.mark.parametrize("threads", [1, 2])
def test_weight_gradient_does_not_depend_on_threads(threads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 257, generator=generator)
    weight = torch.randn(257, generator=generator)
    _, rstd = torch.ops.astrobiogen.rms_norm(x, weight, 1e-6)
    expected = torch.ops.astrobiogen.rms_norm_backward(x, x, weight, rstd, None)[1]
    torch.set_num_threads(threads)
    assert torch.equal(torch.ops.astrobiogen.rms_norm_backward(x, x, weight, rstd, None)[1], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0, 2.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"x must be float32.*got torch\.int64"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \[\.\.\., H\] with H >= 1, got \(\)"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, ValueError, r"x must have shape .* got \(2, 0\)"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have shape \(8,\).*got \(7,\)"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"weight must have shape \(8,\).*got \(1, 8\)"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, r"weight must be on the device of x, cpu, got meta"),
        ({"eps": -1e-6}, ValueError, r"eps must be a finite number >= 0, got -1e-06"),
        ({"eps": "1e-6"}, TypeError, "eps must be a number, got str"),
        ({"eps": float("nan")}, ValueError, r"eps must be a finite number >= 0, got nan"),
        ({"residual": torch.ones(8)}, ValueError, r"residual must have shape \(2, 8\).*got \(8,\)"),
        ({"residual": torch.ones(2, 8).half()}, TypeError, r"residual must have the dtype of x"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6}
    with pytest.raises(error, match=message):
        ops.add_rms_norm(**{**defaults, **arguments})
    if "residual" not in arguments:
        defaults.pop("residual")
        with pytest.raises(error, match=message):
            ops.rms_norm(**{**defaults, **arguments})
