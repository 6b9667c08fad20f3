"""What attention must do whatever its numbers: causality, relative positions, masks, merges of parts."""

import itertools
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

import astrobiogen
from astrobiogen import ops
from astrobiogen.kernels.attention import reference, triton_config
from astrobiogen.kernels.attention.op import attention
from astrobiogen.testing import route
from tests.kernels.memory import peak_bytes


def _tensors(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dim: int = 68
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, queries, heads, dim), torch.randn(1, keys, kv_heads, dim), torch.randn(1, keys, kv_heads, dim)


def test_the_future_never_changes_the_past() -> None:
    q, k, v = _tensors(150, 150)
    before = attention(q, k, v)
    order = torch.cat((torch.arange(91), 91 + torch.randperm(59)))
    after = attention(q[:, order], k[:, order], v[:, order])
    assert torch.equal(before[:, :91], after[:, :91])
    assert not torch.equal(before[:, 91:], after[:, 91:])


def test_shifting_all_positions_changes_nothing() -> None:
    q, k, v = (t.double() for t in _tensors(40, 40))
    frequency = torch.exp(-torch.arange(34, dtype=torch.float64) / 6)
    outputs = []
    for shift in (0, 1000):
        angle = (torch.arange(40) + shift)[:, None] * frequency
        outputs.append(attention(q, k, v, cos=angle.cos(), sin=angle.sin()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-11)
    assert (outputs[0] - attention(q, k, v)).abs().max() > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_inside_equals_rotation_before(interleaved: bool) -> None:
    q, k, v = _tensors(30, 45)
    angle = torch.randn(45, 20)
    turned_q = ops.rope(q, angle[15:].cos(), angle[15:].sin(), interleaved)
    turned_k = ops.rope(k, angle.cos(), angle.sin(), interleaved)
    inside = attention(q, k, v, cos=angle.cos(), sin=angle.sin(), interleaved=interleaved)
    torch.testing.assert_close(inside, attention(turned_q, turned_k, v), rtol=1e-5, atol=1e-6)


def test_a_query_without_keys_gives_zeros_and_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(20, 5))
    out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out[:, :15], torch.zeros_like(out[:, :15]))
    assert torch.isneginf(lse[..., :15]).all()
    assert torch.isfinite(lse[..., 15:]).all()
    assert (out[:, 15:].abs().sum(dim=(0, 2, 3)) > 0).all()
    grads = torch.autograd.grad(out.square().sum() + lse[..., 15:].sum(), (q, k, v))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[0][:, :15], torch.zeros_like(grads[0][:, :15]))


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_beyond_every_key_hides_nothing(causal: bool) -> None:
    q, k, v = _tensors(9, 21, dim=8)
    plain = attention(q, k, v, causal=causal)
    for window in (2**31 - 2, 2**31 - 1, 2**31, 2**62, sys.maxsize, np.int64(2**63 - 1)):
        assert torch.equal(attention(q, k, v, causal=causal, window=window), plain)  # pyright: ignore[reportArgumentType]
    options = reference.Options(None, None, None, None, causal, 8**-0.5, 0, 0.0, False)
    for window in (2**31 - 2, 2**31 - 1, 2**63 - 1):
        wide = options._replace(window=window)
        assert torch.equal(torch.ops.astrobiogen.attention(q, k, v, *wide, True)[0], plain)
        torch.testing.assert_close(reference.attention(q, k, v, *wide)[0], plain, rtol=1e-5, atol=1e-6)
        with route(("attention",), "triton"):
            out = torch.ops.astrobiogen.attention(q, k, v, *wide, True)[0]
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


def test_the_reference_refuses_sequence_bounds_beyond_the_tokens() -> None:
    q, k, v = _tensors(4, 4, dim=8)
    for bounds in ([0, 2**62, 4], [0, -(2**40), 4], [0, 5], [1, 4]):
        with astrobiogen.use_kernels("reference"), pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
            attention(q, k, v, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rest_gives_the_unrounded_output_back(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in _tensors(33, 40, dim=24))
    options = reference.Options(None, None, None, None, True, 0.2, 0, 0.0, False)
    rounded, _, rest = torch.ops.astrobiogen.attention(q, k, v, *options, True)
    exact = torch.ops.astrobiogen.attention(q.float(), k.float(), v.float(), *options, False)[0]
    assert torch.equal(exact.to(dtype), rounded)
    assert torch.equal(reference.unrounded(rounded, rest), exact)
    assert torch.equal(reference.remainder(exact, rounded), rest)


def test_packed_sequences_equal_single_ones() -> None:
    q, k, v = _tensors(140, 140)
    bounds = [0, 1, 70, 70, 133]
    packed = attention(q, k, v, cu_seqlens=torch.tensor(bounds))
    for first, last in itertools.pairwise(bounds):
        rows = slice(first, last)
        torch.testing.assert_close(packed[:, rows], attention(q[:, rows], k[:, rows], v[:, rows]), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed[:, 133:], torch.zeros_like(packed[:, 133:]))


def test_parts_merge_by_their_log_sums() -> None:
    q, k, v = _tensors(9, 100)
    whole, lse = attention(q, k, v, causal=False, return_lse=True)
    parts = [
        attention(q, k[:, rows], v[:, rows], causal=False, return_lse=True) for rows in (slice(0, 33), slice(33, 100))
    ]
    weights = torch.softmax(torch.stack([part[1] for part in parts]), dim=0).transpose(-1, -2).unsqueeze(-1)
    merged = sum(weight * part[0] for weight, part in zip(weights, parts))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.logsumexp(torch.stack([part[1] for part in parts]), dim=0), lse, rtol=1e-5, atol=1e-6
    )


def test_decoding_token_by_token_equals_one_pass() -> None:
    q, k, v = _tensors(70, 70)
    whole = attention(q, k, v, window=50)
    for token in (0, 1, 48, 49, 50, 69):
        step = attention(q[:, token : token + 1], k[:, : token + 1], v[:, : token + 1], window=50)
        torch.testing.assert_close(step, whole[:, token : token + 1], rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = _tensors(65, 65)
    out, lse = attention(q * 1e4, k * 1e4, v, return_lse=True)
    exact, exact_lse = attention(q.double() * 1e4, k.double() * 1e4, v.double(), return_lse=True)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    # the largest score wins everywhere but where two differ by less than the scores' rounding (1e9 * 6e-8)
    assert ((out.double() - exact).abs().amax(dim=-1) < 1e-3).float().mean() > 0.95


@hypothesis.given(
    queries=strategies.integers(1, 40),
    keys=strategies.integers(0, 90),
    group=strategies.sampled_from([1, 2, 5]),
    dim=strategies.integers(1, 40),
    causal=strategies.booleans(),
    window=strategies.none() | strategies.integers(1, 60),
    softcap=strategies.none() | strategies.floats(0.5, 50.0),
)
def test_agrees_with_fp64_for_any_shape(
    queries: int, keys: int, group: int, dim: int, causal: bool, window: int | None, softcap: float | None
) -> None:
    q, k, v = _tensors(queries, keys, group, 1, dim)
    got = attention(q, k, v, causal=causal, window=window, softcap=softcap)
    options = reference.Options(None, None, None, None, causal, dim**-0.5, window or 0, softcap or 0.0, False)
    exact = reference.attention(q.double(), k.double(), v.double(), *options)[0]
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-6)


def _peaks(tokens: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Peaks of the forward and of the backward, with rotation inside."""
    q, k, v = (t.requires_grad_() for t in _tensors(tokens, tokens, heads, kv_heads))
    angle = torch.randn(tokens, 34)
    cos, sin = angle.cos(), angle.sin()
    out = attention(q, k, v, cos=cos, sin=sin)
    upstream = torch.randn_like(out)

    def forward() -> object:
        with torch.no_grad():
            return attention(q, k, v, cos=cos, sin=sin)

    return peak_bytes(forward), peak_bytes(lambda: torch.autograd.grad(out, (q, k, v), upstream))


def test_memory_grows_with_the_length_not_its_square() -> None:
    short, long = _peaks(512, 2, 1), _peaks(1024, 2, 1)
    assert all(2 * a * 0.9 < b < 2 * a * 1.1 for a, b in zip(short, long))
    out = 4 * 1024 * 2 * 68
    # out, log-sum-exp, one copy of K and V; one head's scores alone would be 4 MiB
    assert out < long[0] < 2.2 * out < 4 * 1024 * 1024


def test_no_buffer_of_keys_per_query_head() -> None:
    few, many = _peaks(256, 16, 16), _peaks(256, 64, 16)
    row = 4 * 256 * 68  # one head in fp32
    assert many[0] - few[0] <= 48 * 1.1 * row  # 48 more heads of the output
    assert many[1] - few[1] <= 48 * 1.1 * row  # 48 more heads of dQ, not of dK and dV


def test_triton_ignores_neighbouring_memory_in_a_fused_projection() -> None:
    heads, kv_heads, dim = 2, 1, 20
    fused = torch.randn(1, 18, heads + 2 * kv_heads, dim + 3)
    clean = [t.clone() for t in (fused[:, :, :2, :dim], fused[:, :, 2:3, :dim], fused[:, :, 3:, :dim])]
    fused[..., dim:] = float("nan")
    poisoned = (fused[:, :, :2, :dim], fused[:, :, 2:3, :dim], fused[:, :, 3:, :dim])
    with route(("attention",), "triton"):
        assert torch.equal(attention(*poisoned), attention(*clean))


@pytest.mark.parametrize("dim", [68, 160])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_triton_few_queries_equal_the_reference(queries: int, dim: int) -> None:
    # several splits, a group that does not fill a tile, keys in place at odd strides, a window that hides whole chunks
    q, k, v = torch.randn(2, queries, 6, dim), *torch.randn(2, 2, 90, 2, dim + 1)[..., 1:]
    options = reference.Options(None, None, None, torch.randn(6), True, 0.3, 40, 0.0, False)
    with route(("attention",), "triton") as calls:
        out, lse, _ = torch.ops.astrobiogen.attention(q, k, v, *options, False)
    assert calls == ["attention"]
    expected, expected_lse = reference.attention(q, k, v, *options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_the_cut_of_a_head_holds_it_in_no_more_than_a_power_of_two() -> None:
    for dim in range(1, 257):
        main, tail = triton_config.cut_head(dim)
        power = max(32, 1 << (dim - 1).bit_length())
        assert dim <= main + tail <= power
        assert main & (main - 1) == 0
        assert tail & (tail - 1) == 0
        assert main >= 32  # two halves of 16
        assert tail == 0 or 16 <= tail < 2 * main


def test_head_dimension_68_costs_80_columns() -> None:
    assert triton_config.cut_head(68) == (64, 16)
    assert [triton_config.cut_head(dim) for dim in (64, 80, 96, 100, 160)] == [
        (64, 0),
        (64, 16),
        (64, 32),
        (128, 0),
        (128, 32),
    ]


def test_gradients_of_long_sums_are_as_exact_as_eager() -> None:
    """dK and dV of an early key are sums over all later queries: in blocks, not in one chain of additions."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2048, heads, 16) for heads in (4, 1, 1, 4)]
    *inputs, upstream = (torch.randn(*shape, generator=generator) for shape in shapes)

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [value.to(dtype).requires_grad_() for value in inputs]
        return torch.autograd.grad(ops.attention(*leaves), leaves, upstream.to(dtype))

    with astrobiogen.use_kernels("reference"):
        exact, eager = gradients(torch.float64), gradients(torch.float32)
    for name, right, plain, got in zip("qkv", exact, eager, gradients(torch.float32)):
        allowed = 1.5 * float((plain - right).norm())
        assert float((got - right).norm()) <= allowed, name
