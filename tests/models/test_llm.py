"""The language model: exact sizes, switches, causality, prefix, loss, cache."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from astrobiogen.models import LLMConfig, RebuiltLLMIntegration
from astrobiogen.models.common import trainable_parameters
from astrobiogen.models.llm_config import DOMAINS

SMALL = LLMConfig(
    hidden_size=136, num_attention_heads=2, num_kv_heads=1, num_layers=2, vocab_size=50, intermediate_size=64,
    max_length=16, modality_dims={"climate": 6, "graph": 4},
)  # fmt: skip


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length))


def test_original_size_has_exactly_13_143_113_984_parameters() -> None:
    with torch.device("meta"):
        model = RebuiltLLMIntegration(
            hidden_size=4352, num_attention_heads=64, num_kv_heads=16, num_layers=56, vocab_size=32_000,
            intermediate_size=13_968, use_scientific_reasoning=False,
        )  # fmt: skip
    assert trainable_parameters(model) == 13_143_113_984


def test_original_defaults() -> None:
    config = LLMConfig()
    assert (config.hidden_size, config.head_dim, config.kv_heads, config.num_layers) == (4352, 68, 16, 56)


def test_unknown_names_raise() -> None:
    with pytest.raises(TypeError, match="use_mamba"):
        RebuiltLLMIntegration(use_mamba=True)
    with pytest.raises(TypeError, match="use_lora"):
        RebuiltLLMIntegration(SMALL, use_lora=True)


def layer_difference(config: LLMConfig) -> int:
    return trainable_parameters(RebuiltLLMIntegration(SMALL)) - trainable_parameters(RebuiltLLMIntegration(config))


@pytest.mark.parametrize(
    ("switch", "removed"),
    [
        ("use_scientific_reasoning", len(DOMAINS) * 136),
        ("use_rope", -(16 + 3) * 136),  # learned positions for text and prefix
        ("use_gqa", -2 * 2 * 68 * 136),  # a second key and value head in each of two layers
        ("use_rms_norm", -5 * 136),  # LayerNorm has biases: two per layer and the last one
        ("use_swiglu", 2 * (136 * 64 - 64 - 136)),  # one matrix less, two biases more, in each layer
    ],
)
def test_each_switch_changes_exactly_its_parameters_and_the_result(switch: str, removed: int) -> None:
    config = dataclasses.replace(SMALL, **{switch: False})
    assert layer_difference(config) == removed
    model = RebuiltLLMIntegration(config)
    ids = tokens()
    outputs = model(ids, labels=ids)
    outputs["loss"].backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "projections" not in name)


def test_no_modalities_removes_the_prefix_parameters() -> None:
    without = dataclasses.replace(SMALL, modality_dims={})
    assert layer_difference(without) == 2 * 136 + (6 + 1) * 136 + (4 + 1) * 136


def test_later_tokens_do_not_change_earlier_states() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    ids = tokens()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL.vocab_size
    before, after = model(ids)["hidden_states"], model(changed)["hidden_states"]
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_padding_does_not_change_features_or_loss() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    ids = tokens(1, 6)
    padded = F.pad(ids, (0, 4), value=3)
    mask = torch.arange(10)[None] < 6
    short = model(ids, labels=ids)
    long = model(padded, mask, labels=padded.masked_fill(~mask, -100))
    torch.testing.assert_close(short["features"], long["features"])
    torch.testing.assert_close(short["loss"], long["loss"])


def test_loss_is_shifted_cross_entropy() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    ids = tokens()
    labels = ids.clone()
    labels[0, 4:] = -100
    outputs = model(ids, labels=labels, return_logits=True)
    expected = F.cross_entropy(outputs["logits"][:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(outputs["loss"], expected)
    assert outputs["token_count"].item() == 3 + 8


def test_empty_labels_give_zero_not_nan() -> None:
    model = RebuiltLLMIntegration(SMALL)
    ids = tokens()
    outputs = model(ids, torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -100))
    assert outputs["loss"].item() == 0.0
    assert outputs["features"].abs().max().item() == 0.0


def test_modalities_and_domain_reach_the_loss_through_every_layer() -> None:
    model = RebuiltLLMIntegration(SMALL)
    ids = tokens()
    features = {"climate": torch.randn(2, 6, requires_grad=True), "graph": torch.randn(2, 4, requires_grad=True)}
    outputs = model(ids, labels=ids, modality_features=features)
    outputs["loss"].backward()
    for value in features.values():
        assert value.grad is not None
        assert value.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    losses = [model(ids, labels=ids, domain=domain)["loss"].item() for domain in DOMAINS]
    assert len(set(losses)) == len(DOMAINS)
    by_index = model(ids, labels=ids, domain=torch.full((2,), 3))["loss"].item()
    assert by_index == losses[3]


def test_absent_modality_equals_left_out() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    ids = tokens()
    features = {"climate": torch.randn(2, 6)}
    absent = model(ids, modality_features=features, modality_present={"climate": torch.tensor([True, False])})
    left_out = model(ids)["features"]
    torch.testing.assert_close(absent["features"][1], left_out[1])
    assert not torch.allclose(absent["features"][0], left_out[0])


@pytest.mark.parametrize("use_rope", [True, False])
def test_cached_generation_equals_full_forward(use_rope: bool) -> None:
    model = RebuiltLLMIntegration(SMALL, use_rope=use_rope).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # spreads the logits, so that the arg max is not a near tie
    ids = tokens(2, 4)
    generated = model.generate(ids, 6)
    for position in range(4, 10):
        logits = model(generated[:, :position], return_logits=True)["logits"][:, -1]
        assert torch.equal(logits.argmax(-1), generated[:, position])


def test_generation_has_no_dropout_and_keeps_the_mode() -> None:
    model = RebuiltLLMIntegration(SMALL, dropout=0.5).train()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    ids = tokens(2, 4)
    assert torch.equal(model.generate(ids, 6), model.generate(ids, 6))
    assert all(module.training for module in model.modules())


def test_generation_reads_the_prefix_and_the_batch_rows_on_their_own() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    ids = tokens(2, 4)
    features = {"climate": 20.0 * torch.randn(2, 6)}
    both = model.generate(ids, 8, modality_features=features)
    alone = [model.generate(ids[i : i + 1], 8, modality_features={"climate": features["climate"][i : i + 1]})
             for i in range(2)]  # fmt: skip
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(both, model.generate(ids, 8))
    for position in range(4, 12):
        logits = model(both[:, :position], modality_features=features, return_logits=True)["logits"][:, -1]
        assert torch.equal(logits.argmax(-1), both[:, position])


def test_sampling_is_repeatable_and_stops_at_the_end_token() -> None:
    model = RebuiltLLMIntegration(SMALL).eval()
    ids = tokens(3, 4)
    draws = [model.generate(ids, 8, temperature=1.0, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    model.lm_head.weight.data.zero_()  # every token equally likely: arg max is token 0
    assert model.generate(ids, 8, eos_token_id=0).shape == (3, 5)


def test_checkpointing_is_bitwise_equal_and_saves_fewer_bytes(saved_bytes: Callable[..., int]) -> None:
    ids = tokens(4, 16)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = RebuiltLLMIntegration(SMALL, num_layers=6, use_gradient_checkpointing=checkpointing)
        held = saved_bytes(lambda model=model: model(ids)["hidden_states"].square().mean())
        loss = model(ids)["hidden_states"].square().mean()
        loss.backward()
        results.append((held, loss, [p.grad for p in model.parameters()]))
    (plain_bytes, plain_loss, plain_grads), (few_bytes, few_loss, few_grads) = results
    assert torch.equal(plain_loss, few_loss)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(plain_grads, few_grads))
    assert few_bytes <= 0.5 * plain_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "must have 2 axes"),
        ({"input_ids": torch.zeros(2, 17, dtype=torch.long)}, "axis 'sequence' has size 17"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 5)}, "axis 'sequence'"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[False, True, True]])},
        "padding on the right"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.long), "modality_features": {"climate": torch.zeros(2, 5)}},
        "axis 'feature'"), ({"input_ids": torch.zeros(2, 4, dtype=torch.long), "modality_features": {"sound":
        torch.zeros(2, 5)}}, "sound"), ({"input_ids": torch.zeros(2, 4, dtype=torch.long), "domain": "cooking"},
        "cooking"),
    ],
)  # fmt: skip
def test_wrong_input_names_the_axis(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RebuiltLLMIntegration(SMALL)(**arguments)
