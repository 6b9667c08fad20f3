"""`GroupedQueryAttention` under compilation, autocast and checkpointing, with caches, positions and packed rows."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from astrobiogen import ops
from astrobiogen.layers import GroupedQueryAttention, RotaryEmbedding


def flagship(**options: Any) -> tuple[GroupedQueryAttention, RotaryEmbedding]:
    """Four query heads and two key/value heads of 68 columns."""
    return GroupedQueryAttention(4 * 68, 4, 2, **options), RotaryEmbedding(68)


class LlamaAttention(nn.Module):
    """The projections of Hugging Face's `LlamaAttention`, by name and shape, around SDPA; angles come doubled there."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [B, S, hidden]; cos, sin [S, head_dim]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        half = self.head_dim // 2
        q, k = (t * cos + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * sin for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def test_llama_weights_load_unchanged() -> None:
    theirs = LlamaAttention(4 * 68, 4, 2, 68)
    ours, rotary = flagship()
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    x = torch.randn(2, 33, 272, requires_grad=True)
    cos, sin = rotary(torch.arange(33))
    got, expected = ours(x, (cos, sin)), theirs(x, cos.repeat(1, 2), sin.repeat(1, 2))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, (x, *ours.parameters()), upstream)
    expected_grads = torch.autograd.grad(expected, (x, *theirs.parameters()), upstream)
    torch.testing.assert_close(got_grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_biases_are_those_of_llama_with_attention_bias() -> None:
    layer = GroupedQueryAttention(32, 4, 2, bias=True, output_bias=True)
    assert set(layer.state_dict()) == {f"{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_autocast_and_checkpointed_equal_the_plain_layer(dtype: torch.dtype) -> None:
    layer, rotary = flagship()
    x, angles = torch.randn(2, 19, 272), rotary(torch.arange(19))
    upstream = torch.randn(2, 19, 272)

    def run(call: Any) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = call(leaf, angles)
        assert out.dtype == dtype
        return out, *torch.autograd.grad(out, (leaf, *layer.parameters()), upstream.to(dtype))

    plain = run(layer)
    for mine, theirs in zip(run(lambda *args: checkpoint(layer, *args, use_reentrant=False)), plain, strict=True):
        assert torch.equal(mine, theirs)
    torch.compiler.reset()
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    # The compiler adds the three projections' bf16 gradients in an order of its own: a rounding each.
    for mine, theirs in zip(compiled, plain, strict=True):
        assert (mine - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()


def test_positions_by_number_equal_angles() -> None:
    layer, rotary = flagship()
    x, positions = torch.randn(2, 7, 272), torch.randint(0, 90, (2, 7))
    tables = ops.rope_frequencies(90, 68)
    torch.testing.assert_close(layer(x, tables, position_ids=positions), layer(x, rotary(positions)))
    with pytest.raises(ValueError, match="position_ids need position_embeddings"):
        layer(x, position_ids=positions)


def test_packed_sequences_equal_single_ones() -> None:
    layer, _ = flagship(window=9)
    x, bounds = torch.randn(1, 40, 272), torch.tensor([0, 11, 40])
    tables = ops.rope_frequencies(40, 68)
    positions = torch.cat((torch.arange(11), torch.arange(29)))
    packed = layer(x, tables, position_ids=positions, cu_seqlens=bounds)
    for first, last in ((0, 11), (11, 40)):
        alone = layer(x[:, first:last], tables, position_ids=torch.arange(last - first))
        torch.testing.assert_close(packed[:, first:last], alone)
    cache = layer.new_cache(1, 40, device=x.device, dtype=x.dtype)
    with pytest.raises(ValueError, match="cu_seqlens and cache exclude each other"):
        layer(x, cache=cache, cu_seqlens=bounds)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_cache_in_pieces_equals_one_pass(interleaved: bool) -> None:
    layer, rotary = flagship(interleaved=interleaved, window=12)
    x = torch.randn(2, 31, 272)
    with torch.no_grad():
        whole = layer(x, rotary(torch.arange(31)))
        cache = layer.new_cache(2, 31, device=x.device, dtype=x.dtype)
        for start, stop in ((0, 17), (17, 18), (18, 19), (19, 31)):
            piece = layer(x[:, start:stop], rotary(torch.arange(start, stop)), cache)
            torch.testing.assert_close(piece, whole[:, start:stop])
        cache.length = 30  # take the last position back
        torch.testing.assert_close(layer(x[:, 30:], rotary(torch.arange(30, 31)), cache), whole[:, 30:])


def test_cached_keys_are_stored_rotated_and_never_written_again() -> None:
    layer, rotary = flagship()
    x = torch.randn(1, 6, 272)
    with torch.no_grad():
        cache = layer.new_cache(1, 8, device=x.device, dtype=x.dtype)
        layer(x[:, :5], rotary(torch.arange(5)), cache)
        before = cache.keys[:, :5].clone()
        layer(x[:, 5:], rotary(torch.arange(5, 6)), cache)
        expected = ops.rope(layer.k_proj(x).view(1, 6, 2, 68), *rotary(torch.arange(6)))
    assert torch.equal(cache.keys[:, :5], before)
    torch.testing.assert_close(cache.keys[:, :6], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_cache_start_at_16_bytes(dtype: torch.dtype) -> None:
    cache = GroupedQueryAttention(2 * 67, 2, 1, 67).new_cache(2, 5, device=torch.device("cpu"), dtype=dtype)
    for buffer in (cache.keys, cache.values):
        assert buffer.shape == (2, 5, 1, 67)
        assert all(stride * dtype.itemsize % 16 == 0 for stride in buffer.stride()[:3])


def test_a_cache_refuses_what_it_cannot_hold() -> None:
    layer, _ = flagship()
    cache = layer.new_cache(1, 4, device=torch.device("cpu"), dtype=torch.float32)
    assert cache.capacity == 4
    with pytest.raises(RuntimeError, match="keys requires a gradient"):
        layer(torch.randn(1, 2, 272), cache=cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"keys must be \[1, S, 2, 68\]"):
            layer(torch.randn(2, 2, 272), cache=cache)
        with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
            layer(torch.randn(1, 5, 272), cache=cache)
    assert cache.length == 0
    assert torch.equal(cache.keys, torch.zeros_like(cache.keys))


def test_layer_and_copy_are_deterministic() -> None:
    layer, rotary = flagship()
    twin = copy.deepcopy(layer)
    x, angles = torch.randn(2, 50, 272), rotary(torch.arange(50))
    assert torch.equal(layer(x, angles), twin(x, angles))
