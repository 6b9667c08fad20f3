"""Swapped models against themselves before the swap."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import astrobiogen
from astrobiogen.layers import ConvNd, RMSNorm

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {"head_dim": 20},
}


def build(family: str) -> Any:
    """A tiny randomly initialised model."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.double().logsumexp(-1).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_generation_stay(family: str) -> None:
    model = build(family)
    exact = copy.deepcopy(model).double()
    swapped = copy.deepcopy(model)
    names, own = list(swapped.state_dict()), {id(parameter) for parameter in swapped.parameters()}
    table = astrobiogen.swap_layers(swapped)
    assert list(swapped.state_dict()) == names
    assert {id(parameter) for parameter in swapped.parameters()} == own
    kinds = [row.was for row in table.swapped]
    assert kinds.count(f"{family}MLP") == kinds.count(f"{family}Attention") == 2
    assert kinds.count(f"{family}RMSNorm") == (9 if family == "Qwen3" else 5)
    assert "ops.attention" in str(table)
    ids = torch.randint(3, 97, (2, 12))
    reference, exact_gradients = gradients(exact, ids)
    (eager, eager_gradients), (ours, our_gradients) = gradients(model, ids), gradients(swapped, ids)
    floor = 1e-6
    assert error(ours, reference) <= 2 * error(eager, reference) + floor
    for name, value in exact_gradients.items():
        assert error(our_gradients[name], value) <= 3 * error(eager_gradients[name], value) + floor, name
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), swapped.generate(ids, **settings))


def test_padding_is_masked_by_sdpa() -> None:
    model = build("Mistral")
    swapped = copy.deepcopy(model)
    astrobiogen.swap_layers(swapped)
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        before, after = (one(input_ids=ids, attention_mask=mask).logits for one in (model, swapped))
    torch.testing.assert_close(before[mask.bool()], after[mask.bool()], rtol=1e-4, atol=1e-5)


def test_torch_layers() -> None:
    class Scaled(nn.RMSNorm):
        pass

    twice = nn.RMSNorm(6, eps=1e-5)
    model = nn.ModuleDict({
        "norm": twice, "again": twice, "wide": nn.RMSNorm((2, 6)), "scaled": Scaled(6), "hooked": nn.RMSNorm(6),
        "few": nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"), "many": nn.Conv1d(32, 16, 3),
    })  # fmt: skip
    model["hooked"].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model)
    table = astrobiogen.swap_layers(model)
    reasons = {row.name: (row.now, row.reason) for row in table}
    assert isinstance(model["norm"], RMSNorm)
    assert model["again"] is model["norm"]
    assert isinstance(model["few"], ConvNd)
    assert reasons["wide"] == ("", "normalises several axes")
    assert reasons["hooked"] == ("", "it has hooks")
    assert "32 -> 16 channels" in reasons["many"][1]
    assert "scaled" not in reasons
    x, image = torch.randn(4, 6), torch.randn(2, 3, 7, 8)
    torch.testing.assert_close(model["norm"](x), before["norm"](x))
    torch.testing.assert_close(model["few"](image), before["few"](image))
    model.load_state_dict(before.state_dict())
    with pytest.raises(TypeError, match="bare RMSNorm"):
        astrobiogen.swap_layers(nn.RMSNorm(3))
