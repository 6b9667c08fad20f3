"""Layers known by what their `forward` computes, whatever their class and its parts are called."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import astrobiogen
from astrobiogen.integrations.formulas import GatedMLP, Norm, mlp_of, norm_of
from astrobiogen.layers import RMSNorm

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 12, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
# class -> (norms, MLPs, attention layers) that are swapped
FAMILIES = {
    "Gemma": (5, 0, 2),  # 1 + weight; its MLP is gated with GELU
    "Gemma2": (9, 0, 2),  # and a soft cap
    "Olmo2": (9, 2, 2),  # the weight before the rounding
    "Phi3": (5, 2, 2),  # gate and up in one projection
    "Granite": (5, 2, 2),
    "Qwen2Moe": (5, 2, 2),
    "Mixtral": (5, 0, 2),  # its experts are a kernel of their own
    "GptOss": (5, 0, 2),  # sinks
    "Cohere": (0, 2, 2),  # a LayerNorm without bias
}


class Scale(nn.Module):
    """An RMS norm by another name, written in another way."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.tiny = 1e-5

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        factor = (wide.square().mean(dim=-1, keepdim=True) + self.tiny).pow(-0.5)
        return (wide * factor).type_as(hidden) * self.weight


class CentredRMSNorm(Scale):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)
        return (wide * factor).to(hidden.dtype) * self.weight * self.weight


class OtherAxisRMSNorm(Scale):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + self.tiny)).to(hidden.dtype) * self.weight


class LoopRMSNorm(Scale):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            hidden = hidden * self.weight
        return hidden


class Gated(nn.Module):
    """A gated MLP with names of its own."""

    def __init__(self, size: int, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.w1 = nn.Linear(size, 64 if packed else 32)
        self.w3 = nn.Linear(size, 32)
        self.w2 = nn.Linear(32, size, bias=False)
        self.act = nn.SiLU()
        if packed:
            del self.w3

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.packed:
            a, b = self.w1(h).chunk(2, dim=-1)
            return self.w2(b * self.act(a))
        return self.w2(self.act(self.w1(h)) * self.w3(h))


class Swapped(Gated):
    """The halves the other way round: up before gate."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        a, b = self.w1(h).chunk(2, dim=-1)
        return self.w2(a * self.act(b))


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)  # weights of one hide an offset
    return model


def gradients(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.logsumexp(-1).mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["Phimoe", "Olmoe"])
def test_the_window_is_that_of_the_mask(family: str) -> None:
    """Phimoe's layers leave a window out that its mask has, Olmoe's name one that its mask has not."""
    config = getattr(transformers, f"{family}Config")(**SIZES, sliding_window=5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(3, 97, (2, 12))
    expected = model(input_ids=ids, use_cache=False).logits
    table = astrobiogen.swap_layers(model, only=("attention",))
    assert len(table.swapped) == 2
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_families_are_swapped_and_stay_the_same(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, 97, (2, 12))
    expected, expected_gradients = gradients(model, ids)
    table = astrobiogen.swap_layers(model)
    kinds = [row.was for row in table.swapped]
    counts = tuple(sum(word in kind for kind in kinds) for word in ("Norm", "MLP", "Attention"))
    assert counts == FAMILIES[family], repr(table)
    got, got_gradients = gradients(model, ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert list(got_gradients) == list(expected_gradients)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(got_gradients[name], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    after = model.generate(ids, **settings)
    table.restore()
    assert not [name for name, part in model.named_modules() if type(part).__module__.startswith("astrobiogen")]
    assert "_loss_function" not in model.__dict__
    assert torch.equal(model.generate(ids, **settings), after)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_norm_is_known_by_its_formula() -> None:
    assert norm_of(Scale(8)) == Norm(1e-5, 0.0, False)
    for kind in (CentredRMSNorm, OtherAxisRMSNorm, LoopRMSNorm):
        assert "none of the known formulas" in str(norm_of(kind(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swapped_norm_has_the_dtype_of_the_original(dtype: torch.dtype) -> None:
    """In transformers an fp32 weight makes an fp32 result of half-precision input."""
    model = nn.Sequential(nn.Identity(), Scale(64))
    x = torch.randn(5, 64).to(dtype)
    expected = model(x)
    astrobiogen.swap_layers(model)
    assert isinstance(model[1], RMSNorm)
    assert model(x).dtype == expected.dtype == torch.float32
    torch.testing.assert_close(model(x), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_gated_mlp_is_known_by_its_formula() -> None:
    assert mlp_of(Gated(16, False)) == GatedMLP("w1", "w3", "w2", "act")
    assert mlp_of(Gated(16, True)) == GatedMLP("w1", "w1", "w2", "act")
    assert "none of the known formulas" in str(mlp_of(Swapped(16, True)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_swapped_mlp_calls_children_that_do_more(packed: bool) -> None:
    model = nn.Sequential(Gated(16, packed), nn.Identity())
    x = torch.randn(3, 16)
    expected = model(x)
    names = list(model.state_dict())
    astrobiogen.swap_layers(model)
    assert type(model[0]).__module__.startswith("astrobiogen")
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)
    seen = []
    model[0].w1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert seen == [1]


def test_a_source_that_lies_is_found_out_by_the_trial() -> None:
    """The formula is read from the source; another function may have been put where `torch.rsqrt` is looked for."""

    class Tricked(Scale):
        def __getattr__(self, name: str) -> Any:
            found = super().__getattr__(name)
            return found * 2 if name == "weight" else found

    model = nn.Sequential(Tricked(8))
    (row,) = astrobiogen.swap_layers(model)
    assert (row.now, row.reason) == ("", "a trial with random input gave other values")


def test_only_and_exclude() -> None:
    model = build("Olmo2")
    first = astrobiogen.swap_layers(copy.deepcopy(model), only=("norm",))
    assert {row.was for row in first.swapped} == {"Olmo2RMSNorm"}
    second = astrobiogen.swap_layers(copy.deepcopy(model), exclude=("attention", "loss", "model.layers.0.*"))
    assert {row.was for row in second.swapped} == {"Olmo2RMSNorm", "Olmo2MLP"}
    assert not [row for row in second.swapped if row.name.startswith("model.layers.0.")]
    assert {row.reason for row in second if row.name == "model.layers.0.mlp"} == {"not chosen"}
    assert {row.was for row in second if not row.now} >= {"Linear", "Olmo2Attention"}
    with pytest.raises(TypeError, match="only: got 'norm', expected a sequence of kinds"):
        astrobiogen.swap_layers(model, only="norm")


def test_restore_keeps_what_was_learned() -> None:
    model = nn.Sequential(Scale(8), Gated(8, False))
    table = astrobiogen.swap_layers(model)
    model.to(torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = model(x)
    table.restore()
    assert type(model[0]) is Scale
    assert type(model[1]) is Gated
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    table.restore()  # nothing is left to do
