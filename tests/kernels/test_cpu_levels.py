"""The C++ kernels at every instruction-set level that this CPU offers: AVX2 must be right where AVX-512 runs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from astrobiogen import ops, use_kernels
from astrobiogen.kernels import registry
from astrobiogen.kernels.attention import samples as attention_samples
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.conv_nd.samples import CASES as CONV_CASES
from astrobiogen.kernels.conv_nd.samples import NORM_GROUPS, NORM_SHAPES, norm_case, random_case
from astrobiogen.kernels.edge_attention import samples as edge_samples
from astrobiogen.kernels.linear import reference as linear_reference
from astrobiogen.kernels.linear import samples as linear_samples
from astrobiogen.kernels.rms_norm import reference as rms_norm_reference
from astrobiogen.kernels.rms_norm.samples import CASES as RMS_NORM_CASES
from astrobiogen.kernels.rms_norm.samples import with_residual
from astrobiogen.kernels.rope import reference as rope_reference
from astrobiogen.kernels.rope.samples import CASES as ROPE_CASES
from astrobiogen.kernels.swiglu import reference as swiglu_reference
from astrobiogen.kernels.swiglu.samples import CASES as SWIGLU_CASES
from astrobiogen.kernels.swiglu_mlp import samples as mlp_samples
from astrobiogen.testing import check_nonfinite, check_op

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")
LEVELS = extension.cpu_levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at one level and by the rules that give most to own kernels; both come back after it."""
    core = extension.cpu_core()
    extension.set_cpu_level(request.param)
    extension.set_cpu_core("other")
    with registry.only_ops():
        yield request.param
    extension.set_cpu_level(LEVELS[-1])
    extension.set_cpu_core(core)


def plain_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The definition with the public function's arguments."""
    return rope_reference.rope(x, cos, sin, interleaved, False)


def plain_conv(**arguments: Any) -> torch.Tensor:
    """The convolution's definition with the public function's arguments."""
    with use_kernels("reference"):
        return ops.conv_nd(**arguments)


def plain_conv_norm(**arguments: Any) -> torch.Tensor:
    """The definition of the convolution with a norm."""
    with use_kernels("reference"):
        return ops.conv_nd_norm(**arguments)


def plain_mlp(**arguments: torch.Tensor) -> torch.Tensor:
    """The definition of the SwiGLU block."""
    with use_kernels("reference"):
        return ops.swiglu_mlp(**arguments)


CONV_OPS = ("conv_nd", "conv_transpose_nd", "conv_nd_weight_grad", "conv_nd_bias_grad")
# The own kernels and the composition, each with every norm.
CONV_NORM_CASES = tuple(norm_case(norm, *shape) for norm in NORM_GROUPS for shape in NORM_SHAPES[:4])

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...], tuple[Case, ...]]] = {
    "rms_norm": (ops.rms_norm, rms_norm_reference.rms_norm, ("rms_norm", "rms_norm_backward"), tuple(RMS_NORM_CASES)),
    "add_rms_norm": (
        ops.add_rms_norm,
        rms_norm_reference.add_rms_norm,
        ("add_rms_norm", "rms_norm_backward"),
        tuple(with_residual(case) for case in RMS_NORM_CASES),
    ),
    "swiglu": (ops.swiglu, swiglu_reference.swiglu, ("swiglu", "swiglu_backward"), tuple(SWIGLU_CASES)),
    "conv_nd": (ops.conv_nd, plain_conv, CONV_OPS, CONV_CASES),
    "conv_nd_norm": (
        ops.conv_nd_norm,
        plain_conv_norm,
        ("conv_nd_norm", "conv_nd_norm_backward", *CONV_OPS),
        CONV_NORM_CASES,
    ),
    "edge_attention": (
        edge_samples.edge_attention,
        edge_samples.plain,
        ("edge_attention", "edge_attention_backward"),
        tuple(edge_samples.CASES),
    ),
    "rope": (ops.rope, plain_rope, ("rope",), tuple(ROPE_CASES)),
}
# fp32 alone has kernels; everything else is PyTorch's.
NARROW: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...], tuple[Case, ...]]] = {
    "linear": (ops.linear, linear_reference.linear, ("linear", "linear_backward"), tuple(linear_samples.CASES)),
    "swiglu_mlp": (ops.swiglu_mlp, plain_mlp, ("swiglu_mlp", "swiglu_mlp_backward"), tuple(mlp_samples.CASES)),
}


@pytest.mark.parametrize("op", NARROW)
def test_narrow_layers(level: str, op: str) -> None:
    function, reference, names, cases = NARROW[op]
    assert extension.cpu_capability() == level
    for case in cases:
        check_op(function, reference, case, torch.float32, ops=names, implementation="cpu")


@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(level: str, op: str) -> None:
    function, reference, names, cases = OPS[op]
    assert extension.cpu_capability() == level
    for case in cases:
        for dtype in DTYPES:
            check_op(function, reference, case, dtype, ops=names, implementation="cpu")
        if case.gradcheck:
            check_nonfinite(function, reference, case, ops=names, implementation="cpu")


def plain_attention(*tensors: torch.Tensor, **options: Any) -> Any:
    """The definition with the public function's arguments."""
    with use_kernels("reference"):
        return ops.attention(*tensors, **options)


ATTENTION_CASES = (
    *attention_samples.CASES,
    *attention_samples.FEW,
    # tails of every register width; panels, key tiles and tasks that end in between
    *(
        Case(f"dim_{dim}", attention_samples.plain(1, 37, 130, 6, 2, dim, rotary=dim // 2), ("q", "k", "v"))
        for dim in (8, 67, 68, 100, 256)
    ),
)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_attention(level: str, case: Case) -> None:
    assert extension.cpu_capability() == level
    names = ("attention", "attention_backward")
    for dtype in DTYPES:
        # the gradient of sinks is taken from the rounded output: tests/kernels/test_attention.py derives the floor
        rounding = 20 * torch.finfo(dtype).eps if "sinks" in case.differentiable and dtype != torch.float32 else 0.0
        check_op(ops.attention, plain_attention, case, dtype, ops=names, implementation="cpu", absolute_floor=rounding)
    if case.gradcheck:
        check_nonfinite(ops.attention, plain_attention, case, ops=names, implementation="cpu")


def test_the_level_decides_for_attention(level: str) -> None:
    """Another register width sums in another order, so some bit differs from the highest level's; no run differs."""
    q, k, v = (torch.randn(1, 200, heads, 68) for heads in (4, 2, 2))
    found = ops.attention(q, k, v)
    assert torch.equal(found, ops.attention(q, k, v))
    extension.set_cpu_level(LEVELS[-1])
    assert torch.equal(found, ops.attention(q, k, v)) == (level == LEVELS[-1])


@pytest.mark.usefixtures("level")
def test_every_bf16_gate() -> None:
    """All 65,536 bit patterns: in blocks, whose exponentials are taken beside the products of the block before,
    as in pieces too short for a block, and both against fp64."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    up = torch.randn(2**16, dtype=torch.bfloat16)
    h = ops.swiglu(gate, up)
    pieces = [ops.swiglu(g, u) for g, u in zip(gate.split(48), up.split(48))]
    assert torch.equal(h.view(torch.int16), torch.cat(pieces).view(torch.int16))
    # from -88 down AVX2 code takes the sigmoid, then below 6e-39, for 0
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    normal = gate.isfinite() & (gate > -88) & (exact.abs() < torch.finfo(torch.bfloat16).max)
    error = (h.double() - exact).abs()[normal]
    assert bool((error <= 2**-8 * 1.03 * exact.abs()[normal] + 1e-38).all())
    assert torch.equal(h.isnan(), gate.isnan() | (gate.isinf() & ((gate < 0) | (up == 0))))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [2**21, 2**21 + 3])
def test_stores_past_the_cache(columns: int, dtype: torch.dtype) -> None:
    """Outputs over 4 MiB take other store instructions; rows of 2^20 columns are one more way to get there."""
    gate, up, grad = torch.randn(3, columns, dtype=dtype).unbind(0)
    pieces = [slice(start, start + 99_968) for start in range(0, columns, 99_968)]
    whole = (ops.swiglu(gate, up), *torch.ops.astrobiogen.swiglu_backward(grad, gate, up))
    parts = [
        (ops.swiglu(gate[p], up[p]), *torch.ops.astrobiogen.swiglu_backward(grad[p], gate[p], up[p])) for p in pieces
    ]
    for large, small in zip(whole, zip(*parts)):
        assert torch.equal(large, torch.cat(small))
    # Rows that start anywhere: only their aligned middle goes past the cache.
    packed = torch.randn(101, 2 * 22_001, dtype=dtype)
    rows = [ops.swiglu_packed(row.unsqueeze(0)) for row in packed]
    assert torch.equal(ops.swiglu_packed(packed), torch.cat(rows))
    upstream, packed_backward = torch.randn(101, 22_001, dtype=dtype), torch.ops.astrobiogen.swiglu_packed_backward
    rows = [packed_backward(g.unsqueeze(0), row.unsqueeze(0)) for g, row in zip(upstream, packed)]
    assert torch.equal(packed_backward(upstream, packed), torch.cat(rows))
    x, weight = torch.randn(600, 4352, dtype=dtype), torch.randn(4352, dtype=dtype)
    y, rstd = torch.ops.astrobiogen.rms_norm(x, weight, 1e-6)
    assert torch.equal(y, torch.cat([ops.rms_norm(rows, weight) for rows in x.split(50)]))
    added = [torch.cat(parts) for parts in zip(*(ops.add_rms_norm(a, a.flip(1), weight) for a in x.split(50)))]
    assert all(torch.equal(a, b) for a, b in zip(ops.add_rms_norm(x, x.flip(1), weight), added))
    grad_x, _ = torch.ops.astrobiogen.rms_norm_backward(x, x, weight, rstd, None)
    split = [
        torch.ops.astrobiogen.rms_norm_backward(a, a, weight, r, None)[0] for a, r in zip(x.split(50), rstd.split(50))
    ]
    assert torch.equal(grad_x, torch.cat(split))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [(1, 1, 1), (5, 7, 33), (97, 65, 193), (130, 521, 400), (700, 33, 210), (100, 20, 2100), (33, 2000, 300)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "reduction": "sum"},
        {"z_loss": 1e-2, "softcap": 3.0},
        {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "num_tokens": 11},
    ],
    ids=["plain", "smoothing", "cap", "all"],
)
def test_loss_with_gradients_in_the_forward(tokens: int, hidden: int, vocabulary: int, options: dict[str, Any]) -> None:
    """Blocks, panels, chunks, segments and their ends, weights beyond the cache, against the definition in fp64."""
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,))
    target[1::4] = -100
    loss = ops.linear_cross_entropy(x, weight, target, **options)
    assert "linear_cross_entropy_gradients" in type(loss.grad_fn).__name__
    gradients = torch.autograd.grad(loss, (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    with use_kernels("reference"):
        exact = ops.linear_cross_entropy(*wide, target, **options)
        exact_gradients = torch.autograd.grad(exact, wide)
    for got, expected in zip((loss, *gradients), (exact, *exact_gradients)):
        size = expected.abs().max().item()
        # fp32 products of a few hundred terms: a few units of 6e-8 of the largest value
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=2e-6 * size + 1e-7)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_without_gradients_and_per_token(reduction: str, dtype: torch.dtype) -> None:
    """Several tiles of tokens and vocabulary, at the rule of the shared battery (bf16: fp32 tiles or bf16 ones)."""
    x, weight = torch.randn(530, 24, dtype=dtype), torch.randn(1100, 24, dtype=dtype)
    target = torch.randint(0, 1100, (530,))
    target[::7] = -100
    upstream = torch.randn(530) if reduction == "none" else torch.tensor(1.0)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0}

    def run(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            value = ops.linear_cross_entropy(x, weight, target, **options)
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        loss = ops.linear_cross_entropy(*leaves, target, **options)
        return [value, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    got = run(x, weight)
    with use_kernels("reference"):
        eager, exact = run(x, weight), run(x.double(), weight.double())
    for value, plain, truth, factor in zip(got, eager, exact, (2.0, 3.0, 3.0)):
        allowed = factor * (plain - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (value - truth).abs().max() <= allowed


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", ["rising", "falling", "steps", "nothing_first"])
def test_loss_whose_largest_logits_come_late(shape: str) -> None:
    """What exponentials are relative to moves from chunk to chunk, by tens and by hundreds, in both directions."""
    vocabulary = 1500
    ramp = {
        "rising": torch.linspace(-300.0, 300.0, vocabulary),
        "falling": torch.linspace(300.0, -300.0, vocabulary),
        "steps": 40.0 * torch.randn(15).repeat_interleave(100),
        "nothing_first": torch.where(torch.arange(vocabulary) < 400, -torch.inf, 1.0),  # exp(-Inf) of whole chunks
    }[shape]
    x, weight = torch.randn(40, 16), torch.randn(vocabulary, 16)
    x[:, 0], weight[:, 0] = 1.0, ramp
    target = torch.randint(400, vocabulary, (40,))
    target[::5] = -100

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        loss = ops.linear_cross_entropy(*leaves, target, z_loss=1e-4)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    got = run(torch.float32)
    with use_kernels("reference"):
        eager, exact = run(torch.float32), run(torch.float64)
    for gradients in (eager, exact):
        gradients[1][::5] = 0.0  # 0 x -Inf there too, where ours gives an ignored token exactly 0
    for value, plain, truth, factor in zip(got, eager, exact, (2.0, 3.0, 3.0)):
        assert torch.equal(value.isnan(), truth.isnan())  # 0 x -Inf in the gradient of x
        value, plain, truth = (t.double().nan_to_num(0.0) for t in (value, plain, truth))
        allowed = factor * (plain - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (value - truth).abs().max() <= allowed


@pytest.mark.usefixtures("level")
def test_subnormal_gradients_of_the_loss_are_zero() -> None:
    """Classes 87 to 104 below the largest, which would take a hundred cycles for each product; elsewhere subnormal
    numbers stay what they are.
    """
    x, weight = torch.ones(33, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    weight.detach()[:, 0] = torch.linspace(-120.0, 0.0, 1000)
    loss = ops.linear_cross_entropy(x, weight, torch.randint(0, 1000, (33,)))
    smallest = torch.finfo(torch.float32).tiny
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert not ((gradient != 0.0) & (gradient.abs() < smallest)).any()
    assert float(torch.tensor([smallest]).mul(0.25)) == smallest * 0.25


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_ignored_tokens_may_hold_anything(poison: float) -> None:
    """Their gradient is exactly 0 and the others' does not change by a bit."""
    x, weight = torch.randn(40, 16), torch.randn(1500, 16, requires_grad=True)
    target = torch.randint(0, 1500, (40,))
    target[::3] = -100
    poisoned = torch.where(target[:, None] == -100, poison, x).requires_grad_()
    clean = x.requires_grad_()
    found = [torch.autograd.grad(ops.linear_cross_entropy(t, weight, target), (t, weight)) for t in (clean, poisoned)]
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert not found[1][0][::3].any()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("hidden", "vocabulary", "smoothing"), [(96, 500, 0.0), (20, 2100, 0.0), (20, 2100, 0.1)])
def test_loss_does_not_depend_on_threads_or_on_the_run(hidden: int, vocabulary: int, smoothing: float) -> None:
    """Fewer and more threads than the vocabulary has segments (one and four)."""
    x, weight = torch.randn(130, hidden, requires_grad=True), torch.randn(vocabulary, hidden, requires_grad=True)
    target = torch.randint(0, vocabulary, (130,))
    found = []
    for threads in (1, 2, 7, 1):
        torch.set_num_threads(threads)
        loss = ops.linear_cross_entropy(x, weight, target, label_smoothing=smoothing)
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.usefixtures("level")
def test_random_convolutions() -> None:
    """Any geometry: tiles, tails and pairs of every width, against fp64; inputs are rounded to fp32 first."""
    for seed in range(60):
        arguments = random_case(seed)
        names = ("x", "weight", "bias")
        wide = [arguments[name].requires_grad_() for name in names]
        single = [arguments[name].detach().float().requires_grad_() for name in names]
        with use_kernels("reference"):
            exact = ops.conv_nd(**arguments)
        y = ops.conv_nd(**{**arguments, **dict(zip(names, single))})
        upstream = torch.randn_like(exact)
        expected = torch.autograd.grad(exact, wide, upstream, materialize_grads=True)
        found = torch.autograd.grad(y, single, upstream.float(), materialize_grads=True)
        for got, right in zip((y, *found), (exact, *expected)):
            difference, size = (got.double() - right).detach().norm(), right.detach().norm()
            assert float(difference) <= 1e-5 * float(size) + 1e-5, seed


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "spatial", "mode"),
    [
        (64, 72, 1, (5, 16), "circular"),
        (72, 65, 1, (2, 6, 17), "zeros"),
        (128, 128, 2, (3, 2, 19), "circular"),
        (64, 64, 1, (2, 131), "circular"),
        (65, 64, 1, (1, 4, 64), "replicate"),
        (64, 96, 1, (2, 1, 2, 3, 18), "reflect"),
        (96, 64, 1, (3, 2, 33), "circular"),
    ],
)
def test_gradients_by_pairs_along_the_last_axis(
    channels: int, outputs: int, groups: int, spatial: tuple[int, ...], mode: str
) -> None:
    """Channels enough for the gradients to pair the last axis: odd and even widths, rows longer than a segment, groups
    and halos, kernel 3 on every axis."""
    x = torch.randn(2, channels, *spatial).double()
    weight = torch.randn(outputs, channels // groups, *[3] * len(spatial)).double()
    modes = (*["zeros"] * (len(spatial) - 1), mode)

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = ops.conv_nd(*leaves, padding=1, padding_mode=modes, groups=groups)
        upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad(y, leaves, upstream.to(dtype))

    with use_kernels("reference"):
        exact, eager = gradients(torch.float64), gradients(torch.float32)
    for got, plain, right in zip(gradients(torch.float32), eager, exact):
        ours, theirs = ((value.double() - right).abs().max() for value in (got, plain))
        assert ours <= 3 * theirs + 1e-6 * right.abs().max()


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be 'baseline', 'avx2' or 'avx512', got 'sse9'"):
        extension.set_cpu_level("sse9")
