"""Layers against what they replace: values, state dicts, initialisation."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from astrobiogen import ops
from astrobiogen.layers import (
    Conv4d,
    Conv5d,
    ConvNd,
    GroupedQueryAttention,
    LinearCrossEntropy,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)


def test_rms_norm_replaces_torch() -> None:
    ours, theirs = RMSNorm(68), nn.RMSNorm(68, eps=1e-6)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 3, 68), torch.randn(2, 3, 68)
    torch.testing.assert_close(ours(x), theirs(x))
    normed, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, theirs(x + residual))


def test_residual_in_another_precision_is_promoted() -> None:
    x, residual = torch.randn(3, 8).half(), torch.randn(3, 8)
    normed, total = RMSNorm(8)(x, residual)
    assert (normed.dtype, total.dtype) == (torch.float32, torch.float32)
    assert torch.equal(total, x.float() + residual)


def eager_swiglu(layer: SwiGLU, x: torch.Tensor) -> torch.Tensor:
    state = layer.state_dict()
    gate, up = (F.linear(x, state[f"{name}_proj.weight"]) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, state["down_proj.weight"])


@pytest.mark.parametrize("pad", [False, True])
def test_swiglu(pad: bool) -> None:
    layer = SwiGLU(12, 40, pad_intermediate=pad)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "gate_proj.weight": (40, 12), "up_proj.weight": (40, 12), "down_proj.weight": (12, 40),
    }  # fmt: skip
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), eager_swiglu(layer, x))


def test_padded_swiglu_trains_like_the_plain_one() -> None:
    plain, padded = SwiGLU(12, 40, bias=True), SwiGLU(12, 40, bias=True, pad_intermediate=True)
    padded.load_state_dict(plain.state_dict())
    assert padded.gate_proj.weight.shape == (64, 12)
    x = torch.randn(5, 12)
    for layer in (plain, padded):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(padded.state_dict()[key], value)
    assert padded.gate_proj.weight[40:].abs().max() == 0
    assert padded.down_proj.weight[:, 40:].abs().max() == 0
    with pytest.raises(RuntimeError, match="size mismatch"):
        padded.load_state_dict(SwiGLU(12, 41, bias=True).state_dict())


# torch.compile warns about what it does itself with autograd functions
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("pad", [False, True])
def test_swiglu_recomputes_its_product(pad: bool) -> None:
    """Same values and gradients, and nothing of the product's size is kept but gate and up."""
    kept, recomputed = (SwiGLU(12, 40, bias=True, pad_intermediate=pad, recompute=flag) for flag in (False, True))
    recomputed.load_state_dict(kept.state_dict())
    x = torch.randn(2, 5, 12, requires_grad=True)
    found = []
    for layer in (kept, recomputed):
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t)
        with hooks:
            out = layer(x)
        gradients = torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))
        held = layer.gate_proj.weight.shape[0]
        found.append((out, gradients, sizes.count(2 * 5 * held)))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][2] == 2
    assert found[0][2] == 3
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, found[1][0])


@pytest.mark.parametrize(("axes", "torch_class"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_conv_replaces_torch(axes: int, torch_class: Callable[..., nn.Module]) -> None:
    theirs = torch_class(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular")
    ours = ConvNd(axes, 4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *range(6, 6 + axes))
    torch.testing.assert_close(ours(x), theirs(x))
    bound = 1.0 / math.sqrt(2 * 3**axes)  # PyTorch's: Kaiming uniform with a = sqrt(5)
    fresh = ConvNd(axes, 200, 600, 3, groups=100).weight
    assert 0.99 * bound < fresh.abs().max() <= bound


def test_four_and_five_axes() -> None:
    four, five = Conv4d(2, 3, 3, padding=1), Conv5d(2, 3, (1, 1, 3, 3, 3), padding=(0, 0, 1, 1, 1), activation="silu")
    assert four(torch.randn(2, 2, 3, 4, 5, 6)).shape == (2, 3, 3, 4, 5, 6)
    x = torch.randn(2, 2, 1, 1, 4, 5, 6)
    expected = F.silu(F.conv3d(x[:, :, 0, 0], five.weight[:, :, 0, 0], five.bias, padding=1))
    torch.testing.assert_close(five(x)[:, :, 0, 0], expected)
    with pytest.raises(ValueError, match="stride"):
        Conv5d(2, 3, 3, stride=(1, 1))
    with pytest.raises(ValueError, match="groups"):
        Conv4d(2, 3, 3, groups=2)


def test_rotary_scores_depend_on_distance_only() -> None:
    rotary = RotaryEmbedding(68)
    q, k = torch.randn(1, 1, 1, 68), torch.randn(1, 1, 1, 68)

    def score(m: int, n: int) -> float:
        turned = [ops.rope(x, *rotary(torch.tensor([p]))) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_rotary_tables_are_those_of_the_ops() -> None:
    cos, sin = RotaryEmbedding(68, rotary_dim=32)(torch.arange(50))
    expected = ops.rope_frequencies(50, 32)
    torch.testing.assert_close(cos, expected[0])
    torch.testing.assert_close(sin, expected[1])
    stretched = RotaryEmbedding(68, position_scale=4.0)(torch.arange(50))[0]
    torch.testing.assert_close(stretched, ops.rope_frequencies_linear(50, 68, factor=4.0)[0])
    with pytest.raises(ValueError, match="rotary_dim"):
        RotaryEmbedding(67)
    assert not RotaryEmbedding(68).state_dict()


def eager_attention(
    layer: GroupedQueryAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Hugging Face Llama's eager attention, from the same weights."""
    batch, length, _ = x.shape

    def rotate(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)

    q, k, v = (
        projection(x).view(batch, length, -1, layer.head_dim).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    repeats = layer.num_heads // layer.num_kv_heads
    k, v = rotate(k).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = rotate(q) @ k.transpose(2, 3) * layer.head_dim**-0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return layer.o_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_llama(kv_heads: int) -> None:
    layer, rotary = GroupedQueryAttention(4 * 12, 4, kv_heads), RotaryEmbedding(12)
    assert set(layer.state_dict()) == {f"{name}_proj.weight" for name in "qkvo"}
    x, angles = torch.randn(2, 7, 48), rotary(torch.arange(7))
    torch.testing.assert_close(layer(x, angles), eager_attention(layer, x, *angles))


def test_attention_cache_in_pieces_equals_one_pass() -> None:
    layer, rotary = GroupedQueryAttention(2 * 68, 2, 1), RotaryEmbedding(68)
    x = torch.randn(2, 9, 136)
    whole = layer(x, rotary(torch.arange(9)))
    cache = layer.new_cache(2, 9, device=x.device, dtype=x.dtype)
    with torch.no_grad():
        pieces = []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            pieces.append(layer(x[:, start:stop], rotary(torch.arange(start, stop)), cache))
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
        with pytest.raises(ValueError, match="holds 9"):
            layer(x[:, :1], rotary(torch.arange(9, 10)), cache)


def test_attention_checks_its_sizes() -> None:
    with pytest.raises(ValueError, match="num_kv_heads"):
        GroupedQueryAttention(12, 4, 3)
    with pytest.raises(ValueError, match="hidden = 12"):
        GroupedQueryAttention(12, 4)(torch.zeros(1, 2, 13))


def test_linear_cross_entropy_replaces_the_pair() -> None:
    linear = nn.Linear(12, 31, bias=False)
    layer = LinearCrossEntropy(12, 31)
    layer.load_state_dict(linear.state_dict())
    x, target = torch.randn(4, 5, 12), torch.randint(31, (4, 5))
    target[0, :2] = -100
    expected = F.cross_entropy(linear(x).flatten(0, 1), target.flatten())
    torch.testing.assert_close(layer(x, target), expected)
    torch.testing.assert_close(layer.logits(x), linear(x))


def test_layers_follow_autocast() -> None:
    x = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ConvNd(2, 2, 3, 3)(x).dtype == torch.bfloat16
        assert GroupedQueryAttention(8, 2)(torch.randn(1, 3, 8)).dtype == torch.bfloat16
        assert SwiGLU(8, 12)(torch.randn(3, 8)).dtype == torch.bfloat16
        layer = SwiGLU(8, 12, recompute=True)
        layer(torch.randn(3, 8)).sum().backward()
        assert layer.down_proj.weight.grad is not None
        assert layer.down_proj.weight.grad.dtype == torch.float32
