"""The attention interface against transformers' own eager attention: no argument of a call is dropped."""

import copy
from typing import Any

import pytest
import torch

from astrobiogen.integrations import register_attention
from astrobiogen.integrations.hugging_face import attention_forward

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 12, "sliding_window": 5,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 12},  # a soft-cap and alternating windows
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4}},  # attention sinks
    "Qwen3": {},
}  # fmt: skip


def pair(family: str) -> tuple[Any, Any]:
    """A model with our attention, and the same one with transformers' eager attention."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    eager = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in eager.named_parameters():
        if "_proj.weight" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform attention
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation(register_attention())
    return ours, eager


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_are_those_of_eager_attention(family: str, padded: bool) -> None:
    ours, eager = pair(family)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    found = []
    for model in (ours, eager):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.double().logsumexp(-1).sum().backward()
        found.append((logits, model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def call(**options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 6, 12), torch.randn(1, 2, 6, 12), torch.randn(1, 2, 6, 12)
    return attention_forward(torch.nn.Module(), q, k, v, options.pop("attention_mask", None), **options)[0]


BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {}, "window": {"sliding_window": 3}, "two-sided": {"is_causal": False},
    "two-sided window": {"is_causal": False, "sliding_window": 2}, "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([0.5, 1.0, -1.0, 2.0])}, "scale": {"scaling": 0.7},
    "packed": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS},
    "packed two-sided": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "is_causal": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_fallback_is_the_same_function(name: str) -> None:
    """What forces plain PyTorch (here a mask, then a bias, that change nothing) changes nothing."""
    options = OPTIONS[name]
    expected = call(**options)
    torch.testing.assert_close(call(position_bias=torch.zeros(1, 4, 6, 6), **options), expected)
    visible = torch.ones(6, 6, dtype=torch.bool)
    if options.get("is_causal") is not False:
        visible = visible.tril()
    if window := options.get("sliding_window"):
        visible = visible.triu(1 - window).logical_and(torch.ones(6, 6, dtype=torch.bool).tril(window - 1))
    torch.testing.assert_close(call(attention_mask=visible[None, None], **options), expected)
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    torch.testing.assert_close(call(attention_mask=additive, **options), expected)


def test_dropout_keeps_window_and_cached_keys() -> None:
    """Without a mask of transformers' the fall-back makes its own: aligned at the end of the keys."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    module = torch.nn.Module()
    expected = attention_forward(module, q, k, k, None, sliding_window=4)[0]
    torch.testing.assert_close(attention_forward(module, q, k, k, None, 1e-12, sliding_window=4)[0], expected)
    wide = torch.randn(1, 2, 3, 260), torch.randn(1, 2, 7, 260)
    got = attention_forward(module, wide[0], wide[1], wide[1], None)[0]
    seen = torch.ones(3, 7, dtype=torch.bool).tril(4)
    scores = (wide[0] @ wide[1].transpose(2, 3) / 260**0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(got, (scores.softmax(-1) @ wide[1]).transpose(1, 2))


def test_what_is_not_known_is_refused() -> None:
    call(position_ids=torch.arange(6), use_cache=True, cache_position=None, output_attentions=False, novelty=None)
    for options in ({"output_attentions": True}, {"novelty": 1.0}, {"cache": object(), "head_mask": torch.ones(4)}):
        with pytest.raises(ValueError, match="|".join(options)):
            call(**options)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        call(cu_seq_lens_q=BOUNDS)
    with pytest.raises(ValueError, match="one row"):
        call(cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS + 1)
