"""Swapped models against themselves before the swap."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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


def test_swapped_layers_keep_the_attributes_that_others_read() -> None:
    model = build("Llama")
    model.torch_norm = nn.RMSNorm(6, eps=1e-5)
    astrobiogen.swap_layers(model)
    assert isinstance(model.model.norm, RMSNorm)
    assert model.model.norm.variance_epsilon == model.config.rms_norm_eps
    assert model.model.layers[0].mlp.intermediate_size == 80
    assert model.model.layers[0].mlp.config is model.config
    assert isinstance(model.torch_norm, RMSNorm)
    assert model.torch_norm.normalized_shape == (6,)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_of_eager_attention_stays(family: str) -> None:
    model = build(family)
    model.set_attn_implementation("eager")
    rows = [row for row in astrobiogen.swap_layers(model) if row.was == f"{family}Attention"]
    assert model.config._attn_implementation == "eager"
    assert [(row.now, "eager" in row.reason) for row in rows] == [("", True)] * 2


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


def same_class_hooked(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    model.model.layers[1].mlp.down_proj.register_full_backward_pre_hook(lambda *_: None)


def pruned(model: Any) -> None:
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    prune.random_unstructured(model.model.norm, "weight", amount=0.5)


def parametrised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)
    nn.utils.parametrize.register_parametrization(model.model.norm, "weight", nn.Softplus())


def with_adapters(model: Any) -> None:
    for name in ("gate_proj", "down_proj"):
        setattr(model.model.layers[0].mlp, name, Adapted(getattr(model.model.layers[0].mlp, name)))


def own_forward(model: Any) -> None:
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    mlp.up_proj.forward = lambda x, original=mlp.up_proj.forward: original(x) + 0.1
    norm.forward = lambda x, original=norm.forward: original(x) + 0.1
    other = model.model.layers[1].mlp
    other.forward = lambda x, original=other.forward: original(x) * 2


def hooked_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def more_biases(model: Any) -> None:
    for name, size in (("gate_proj", 80), ("up_proj", 80), ("down_proj", 48)):
        getattr(model.model.layers[0].mlp, name).bias = nn.Parameter(torch.randn(size))


def more_parts(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.side = nn.Linear(48, 48)
    mlp.forward = lambda x, original=mlp.forward: original(x) + mlp.side(x)


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT's LoRA puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


CHANGES = [
    same_class_hooked, pruned, parametrised, with_adapters, own_forward, hooked_activation, more_biases, more_parts,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_what_hangs_on_a_model_works_before_and_after_the_swap(change: Callable[[Any], None]) -> None:
    """The same logits and gradients as without the swap, whichever came first; what is left alone says why."""
    plain, ids = build("Llama"), torch.randint(3, 97, (2, 7))
    before, after = copy.deepcopy(plain), copy.deepcopy(plain)
    unchanged = gradients(plain, ids)[0]
    torch.manual_seed(3)
    change(plain)
    torch.manual_seed(3)
    change(before)
    table = astrobiogen.swap_layers(before)
    children = [module for module in after.modules() if type(module) is nn.Linear]
    astrobiogen.swap_layers(after)
    assert {id(module) for module in children} <= {id(module) for module in after.modules()}  # the same objects
    torch.manual_seed(3)
    if change in (hooked_activation, more_parts):  # on parts that the replaced MLP has no more, or its own forward
        after = before
    else:
        change(after)
    expected, expected_gradients = gradients(plain, ids)
    assert not torch.allclose(expected, unchanged, rtol=1e-4, atol=1e-5)
    for model in (before, after):
        got, got_gradients = gradients(model, ids)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert set(got_gradients) == set(expected_gradients)
        for name, value in expected_gradients.items():
            torch.testing.assert_close(got_gradients[name], value, rtol=1e-3, atol=1e-5)
    left = {row.name: row.reason for row in table if not row.now}
    assert all(left.values())
    for name in {pruned: ["norm"], parametrised: ["norm"], with_adapters: ["layers.0.mlp"], more_biases: [],
                 own_forward: ["norm", "layers.1.mlp"], hooked_activation: ["layers.0.mlp"],
                 more_parts: ["layers.0.mlp"], same_class_hooked: []}[change]:  # fmt: skip
        assert f"model.{name}" in left


def test_what_hangs_on_torch_layers_works_before_and_after_the_swap() -> None:
    def make() -> nn.ModuleDict:
        torch.manual_seed(5)
        return nn.ModuleDict({
            "norm": nn.RMSNorm(6), "pruned": nn.RMSNorm(6), "scaled": nn.RMSNorm(6), "extra": nn.RMSNorm(6),
            "conv": nn.Conv3d(3, 16, 3, padding="same"), "weighted": nn.Conv3d(3, 16, 3), "own": nn.Conv3d(3, 8, 3),
        })  # fmt: skip

    def change(model: Any) -> None:
        torch.manual_seed(6)
        prune.random_unstructured(model["pruned"], "weight", amount=0.5)
        nn.utils.parametrize.register_parametrization(model["scaled"], "weight", nn.Softplus())
        nn.utils.parametrizations.weight_norm(model["weighted"])
        model["norm"].register_forward_hook(lambda _module, _inputs, output: output + 1)
        model["own"].forward = lambda x, original=model["own"].forward: original(x) + 1
        model["conv"].bias = nn.Parameter(torch.randn(16))

    plain, before, after = make(), make(), make()
    change(plain)
    change(before)
    before["extra"].register_buffer("steps", torch.zeros(()))
    table = {row.name: row.reason for row in astrobiogen.swap_layers(before)}
    astrobiogen.swap_layers(after)
    change(after)
    assert table["scaled"] == table["weighted"] == "it is parametrised"
    for name, word in (("pruned", "hooks"), ("norm", "hooks"), ("own", "forward"), ("extra", "steps")):
        assert word in table[name]
    assert isinstance(before["conv"], ConvNd)
    inputs = dict.fromkeys(("conv", "weighted", "own"), torch.randn(2, 3, 4, 5, 6))
    for name, module in plain.items():
        x = inputs.get(name, torch.randn(4, 6))
        for model in (before, after):
            torch.testing.assert_close(model[name](x), module(x))
    image = inputs["conv"]
    assert before["conv"](image).view(2, -1).shape == (2, 16 * 120)
    assert before["conv"](image[0]).shape == (16, 4, 5, 6)


def test_swapped_layers_keep_tied_weights_and_modes() -> None:
    model = build("Llama").train()
    model.model.layers[0].mlp.gate_proj.eval()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    astrobiogen.swap_layers(model)
    mlps = [layer.mlp for layer in model.model.layers]
    assert mlps[0].training
    assert not mlps[0].gate_proj.training
    assert mlps[1].up_proj.weight is mlps[0].up_proj.weight
    mlps[0](torch.randn(3, 48)).sum().backward()
    assert mlps[1].up_proj.weight.grad is not None


def test_eps_of_a_swapped_norm_is_that_of_the_computation() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = nn.Sequential(nn.RMSNorm(16, dtype=dtype))
        x = (0.058 * torch.randn(8, 16)).to(dtype) * 1e-2
        expected = model(x)
        astrobiogen.swap_layers(model)
        assert isinstance(model[0], RMSNorm)
        torch.testing.assert_close(model(x), expected)
