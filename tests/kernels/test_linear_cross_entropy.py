"""Linear cross-entropy: the shared battery, agreement with `F.cross_entropy`, options, errors, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from astrobiogen import use_kernels
from astrobiogen.kernels.cases import Case, TensorMaker
from astrobiogen.kernels.linear_cross_entropy import triton_kernels
from astrobiogen.kernels.linear_cross_entropy.op import linear_cross_entropy
from astrobiogen.kernels.linear_cross_entropy.samples import CASES, LONG_CASES
from astrobiogen.testing import check_battery, check_op, route

OPS = ("linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_gradients")


def fused(**arguments: Any) -> torch.Tensor:
    """The op, a scalar loss as [1]: the battery draws upstream gradients of at least one axis."""
    return torch.atleast_1d(linear_cross_entropy(**arguments))


def plain(**arguments: Any) -> torch.Tensor:
    """The definition, under ordinary autograd."""
    with use_kernels("reference"):
        return fused(**arguments)


@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=lambda case: case.name)
def test_battery(case: Case) -> None:
    check_battery(fused, plain, case, ops=OPS)


def draw(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    make = TensorMaker(dtype, torch.device("cpu"), torch.Generator().manual_seed(tokens * 7 + hidden * 3 + vocabulary))
    return {
        "x": make.randn(tokens, hidden).requires_grad_(),
        "weight": make.randn(vocabulary, hidden).requires_grad_(),
        "target": make.randint(0, vocabulary, tokens),
    }


@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 19),
    vocabulary=st.integers(1, 70),
    ignored=st.integers(1, 4),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_is_cross_entropy_of_linear(
    tokens: int, hidden: int, vocabulary: int, ignored: int, smoothing: float, reduction: str
) -> None:
    """Value and gradients are those of PyTorch's own composition, in fp64, for any shape; NaN for a mean over
    nothing included.
    """
    arguments = draw(tokens, hidden, vocabulary)
    x, weight, target = arguments.values()
    target[::ignored] = -100
    ours = linear_cross_entropy(**arguments, reduction=reduction, label_smoothing=smoothing)
    eager = F.cross_entropy(F.linear(x, weight), target, reduction=reduction, label_smoothing=smoothing)
    upstream = torch.ones_like(eager)
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12, equal_nan=True)
    for got, expected in zip(
        torch.autograd.grad(ours, (x, weight), upstream), torch.autograd.grad(eager, (x, weight), upstream)
    ):
        torch.testing.assert_close(got, expected.nan_to_num(), rtol=1e-11, atol=1e-11)


@settings(max_examples=8)
@given(tokens=st.integers(1, 3), hidden=st.integers(1, 7), vocabulary=st.integers(1, 90))
def test_triton_shapes(tokens: int, hidden: int, vocabulary: int) -> None:
    """The Triton kernels keep the error rule for any shape."""

    def build(make: TensorMaker) -> dict[str, Any]:
        return {
            "x": make.randn(tokens, hidden),
            "weight": make.randn(vocabulary, hidden),
            "target": make.randint(0, vocabulary, tokens),
        }

    case = Case(f"{tokens}x{hidden}x{vocabulary}", build, ("x", "weight"))
    check_op(fused, plain, case, torch.float32, ops=OPS, implementation="triton")


def test_all_ignored_gives_nan_and_zero_gradients() -> None:
    arguments = draw(5, 4, 9)
    arguments["target"].fill_(-100)
    loss = linear_cross_entropy(**arguments, z_loss=0.1)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (arguments["x"], arguments["weight"])):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_tokens_weights_micro_batches_by_token(as_tensor: bool) -> None:
    """Two unequal micro-batches, each divided by the whole count, add up to the loss and gradients of the whole
    batch.
    """
    arguments = draw(11, 6, 23)
    x, weight, target = arguments.values()
    target[2] = -100
    count = (target != -100).sum() if as_tensor else int((target != -100).sum())
    whole = linear_cross_entropy(x, weight, target)
    parts = sum(linear_cross_entropy(x[s], weight, target[s], num_tokens=count) for s in (slice(0, 3), slice(3, 11)))
    torch.testing.assert_close(parts, whole)
    for got, expected in zip(torch.autograd.grad(parts, (x, weight)), torch.autograd.grad(whole, (x, weight))):
        torch.testing.assert_close(got, expected)


def test_gradients_that_came_with_the_loss_are_scaled_and_stay_right() -> None:
    """float32 on the CPU: another upstream gradient than 1, two passes over one graph, and a change in place between
    them.
    """
    arguments = draw(7, 5, 19, torch.float32)
    x, weight, _ = arguments.values()
    loss = linear_cross_entropy(**arguments)
    plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    tripled = torch.autograd.grad(3.0 * loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(tripled, tuple(3.0 * gradient for gradient in plain))
    again = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(again, plain))
    again[1].zero_()
    last = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(last, plain))
    first = torch.autograd.grad(linear_cross_entropy(**arguments), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward has no second derivative"):
        torch.autograd.grad(first.sum(), weight)


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("bad", [-1, 9, 2**40, -(2**62)])
def test_target_out_of_range(implementation: str, bad: int) -> None:
    arguments = draw(4, 3, 9, torch.float32)
    arguments["target"][2] = bad
    with route(OPS, implementation), pytest.raises(RuntimeError, match=r"target must hold values in \[0, 9\)"):
        linear_cross_entropy(**arguments)


def test_gradients_only_where_needed() -> None:
    """A frozen weight costs no weight gradient, and the other way round; without grad mode nothing is saved."""
    arguments = draw(6, 5, 17)
    x, weight, target = arguments.values()
    both = torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(x, weight.detach(), target), x)[0], both[0])
    torch.testing.assert_close(
        torch.autograd.grad(linear_cross_entropy(x.detach(), weight, target), weight)[0], both[1]
    )
    lse = torch.ops.astrobiogen.linear_cross_entropy(x.detach(), weight.detach(), target, -100, 0.0, 0.0, 0.0)[1]
    ones = torch.ones(6, dtype=torch.float64)
    options = (-100, 0.0, 0.0, 0.0)
    grad_x, grad_weight = torch.ops.astrobiogen.linear_cross_entropy_backward(
        ones, x.detach(), weight.detach(), target, lse, *options, True, False
    )
    assert grad_x.shape == x.shape
    assert grad_weight.numel() == 0
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, target).grad_fn is None


def test_autocast_casts_both() -> None:
    """Under autocast fp32 inputs take the half-precision path, gradients come back in fp32, and the loss is not
    rounded.
    """
    arguments = draw(4, 8, 21, torch.float32)
    x, weight, target = arguments.values()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(**arguments)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")(**arguments)
    rounded = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rounded)
    torch.testing.assert_close(compiled, rounded)
    for got, expected in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(rounded, (x, weight))):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 4.0}], ids=["plain", "options"]
)
@pytest.mark.parametrize("tokens", [299, 700])
def test_bf16_in_several_tiles(tokens: int, options: dict[str, Any], reduction: str) -> None:
    """More columns than a tile has; tokens that find room in the weight's gradient, and more than do."""
    x, weight, target = draw(tokens, 300, 9100, torch.bfloat16).values()
    with torch.no_grad():
        weight.mul_(300**-0.5)
    target[::7] = -100
    upstream = torch.rand(tokens) if reduction == "none" else torch.tensor(1.0)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*leaves, target, reduction=reduction, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    got = run(torch.bfloat16)
    with use_kernels("reference"):
        eager, exact = run(torch.bfloat16), run(torch.float64)
    for value, plain, truth, factor in zip(got, eager, exact, (2.0, 3.0, 3.0)):
        allowed = factor * (plain - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (value - truth).abs().max() <= allowed


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}], ids=str)
@pytest.mark.parametrize("core", ["intel", "other"])
@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(5, 24, 700), (40, 1024, 900), (1100, 1024, 1100)])
def test_fp32_by_the_products_of_every_core(
    tokens: int, hidden: int, vocabulary: int, core: str, options: dict[str, Any]
) -> None:
    """MKL's products serve wide fp32 layers and few tokens on one kind of core, own ones on the others."""
    extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")

    def build(make: TensorMaker) -> dict[str, Any]:
        target = make.randint(0, vocabulary, tokens)
        target[::4] = -100
        return {"x": make.randn(tokens, hidden), "weight": make.randn(vocabulary, hidden) / hidden**0.5} | {
            "target": target,
            **options,
        }

    found = extension.cpu_core()
    extension.set_cpu_core(core)
    try:
        case = Case("any", build, ("x", "weight"))
        assert check_op(fused, plain, case, torch.float32, ops=OPS, implementation="cpu")
    finally:
        extension.set_cpu_core(found)


@pytest.mark.parametrize(("hidden", "vocabulary", "share"), [(32, 8000, 0.15), (512, 32000, 0.10)])
def test_added_memory(hidden: int, vocabulary: int, share: float) -> None:
    """At 512 tokens, beyond the gradients it returns, less than `share` of what eager adds: the block of logits holds
    96 of the tokens, where eager holds the logits and their log-softmax of all.
    """
    x, weight, target = draw(512, hidden, vocabulary, torch.float32).values()
    with torch.no_grad():
        weight.mul_(hidden**-0.5)  # logits near 1: with subnormal probabilities eager would take 20 seconds

    def run(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (x, weight))

    returned = (x.numel() + weight.numel()) * 4
    eager = _peak(lambda: run(F.cross_entropy(F.linear(x, weight), target))) - returned
    ours = _peak(lambda: run(linear_cross_entropy(x, weight, target))) - returned
    assert eager > 2 * 512 * vocabulary * 4 * 0.9
    assert ours < share * eager


def test_a_token_more_than_hidden_columns_adds_memory_for_a_panel_of_tokens() -> None:
    """The logits of as many tokens as hidden columns wait in the weight's gradient; the next one's need 32 lanes."""

    def added(tokens: int) -> int:
        x, weight, target = draw(tokens, 256, 8000, torch.float32).values()
        returned = (x.numel() + weight.numel()) * 4
        return _peak(lambda: torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))) - returned

    assert added(257) - added(256) < 1.3 * 32 * 8000 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_added_memory_without_gradients(dtype: torch.dtype, reduction: str) -> None:
    """One tile (at most 1 MB) and a few numbers per token, where eager holds the logits and their log-softmax."""
    x, weight, target = draw(512, 32, 8000, dtype).values()
    with torch.no_grad():
        eager = _peak(lambda: F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction))
        ours = _peak(lambda: linear_cross_entropy(x, weight, target, reduction=reduction))
    assert eager > 2 * 512 * 8000 * 4 * 0.9
    assert ours < 0.1 * eager


def _peak(function: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's CPU allocator held at once beyond those held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    del kept
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


def test_slabs_cover_the_vocabulary_and_are_aligned() -> None:
    """Slab widths are multiples of 64 (16-byte loads), at least 2048 or the whole vocabulary, and bounded by the
    buffer size.
    """
    for tokens, vocabulary in ((1, 1), (2048, 32000), (2048, 50257), (16384, 128256), (10**6, 32000)):
        columns = triton_kernels.slab_columns(tokens, vocabulary)
        assert columns % 64 == 0
        assert columns >= min(vocabulary, triton_kernels.MIN_COLUMNS)
        assert columns == triton_kernels.MIN_COLUMNS or tokens * columns <= triton_kernels.SLAB_ELEMENTS
    assert triton_kernels.slab_columns(2048, 32000) == 8192


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, ValueError, r"weight must have shape \[V, 3\].*got \(9, 4\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(9, 3, dtype=torch.bfloat16)}, TypeError, "weight must have the dtype of x"),
        ({"weight": torch.zeros(9, 3, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must be float32"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[\.\.\., H\]"),
        ({"target": torch.zeros(4)}, TypeError, "target must be int64"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, "target must have shape"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"reduction": "average"}, ValueError, "reduction must be"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be in"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be"),
        ({"softcap": 0.0}, ValueError, "softcap must be"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
        ({"softcap": True}, TypeError, "softcap must be a number, got bool"),
        ({"num_tokens": torch.ones((), device="meta")}, ValueError, "num_tokens must be on the device of x, cpu, or"),
        ({"num_tokens": 0}, ValueError, "num_tokens must be an integer >= 1"),
        ({"num_tokens": 2.5}, TypeError, "num_tokens must be an integer"),
        ({"num_tokens": torch.ones(2)}, ValueError, "num_tokens must be an int or a 0-d tensor"),
        ({"num_tokens": 3, "reduction": "sum"}, ValueError, "num_tokens is the divisor"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "weight": torch.zeros(9, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))
