"""Causal language models whose loss is computed without the logits."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import astrobiogen
from astrobiogen.integrations.lazy_logits import LazyHead, LazyLogits

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 12,
}  # fmt: skip


def build(family: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    model.zero_grad()
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma2", "Granite", "Cohere", "Phi3", "Olmo2"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_stay(family: str, items: Any) -> None:
    """Soft-capped and scaled logits (Gemma2, Granite, Cohere) are made, and the loss is right there as well."""
    model = build(family)
    swapped = copy.deepcopy(model)
    table = astrobiogen.swap_layers(swapped, only=("loss",))
    assert [row.now for row in table.swapped] == ["LazyHead"]
    inputs = batch() | ({} if items is None else {"num_items_in_batch": items})
    expected, expected_gradients, _ = step(model, **inputs)
    got, gradients, out = step(swapped, **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert list(gradients) == list(expected_gradients)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    if family in ("Llama", "Phi3", "Olmo2"):
        assert isinstance(out.logits, LazyLogits)
        assert out.logits.__dict__["_value"] is None  # nothing has made them


def test_shifted_labels_and_evaluation() -> None:
    model, swapped = build(), build()
    astrobiogen.swap_layers(swapped)
    inputs = batch()
    shifted = {"shift_labels": inputs["labels"].roll(-1, 1)}
    torch.testing.assert_close(step(swapped, **inputs, **shifted)[0], step(model, **inputs, **shifted)[0])
    with torch.no_grad():
        torch.testing.assert_close(swapped.eval()(**inputs).loss, model.eval()(**inputs).loss)
    with torch.inference_mode():
        out = swapped(**inputs)
        torch.testing.assert_close(out.loss, model(**inputs).loss)
        assert out.logits.argmax(-1).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    model, swapped = build(), build()
    astrobiogen.swap_layers(swapped, only=("loss",))
    inputs = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected, got = model(**inputs), swapped(**inputs)
    assert got.logits.dtype == expected.logits.dtype == dtype
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-2, atol=1e-4)
    wide = got.logits.float()  # as wrappers for mixed precision do with what a model returns
    assert isinstance(wide, LazyLogits)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.value(), expected.logits.float(), rtol=2e-2, atol=1e-2)


def test_logits_are_made_when_they_are_asked_for() -> None:
    model, swapped = build().eval(), build().eval()
    astrobiogen.swap_layers(swapped, only=("loss",))
    inputs = batch()
    expected, got = model(**inputs).logits, swapped(**inputs).logits
    assert got.shape == expected.shape
    assert (got.dtype, got.device, got.ndim, got.size(-1), got.numel()) == (torch.float32, expected.device, 3, 97, 2328)
    assert got.__dict__["_value"] is None
    for asked in (lambda x: x[:, -1], torch.argmax, lambda x: x.softmax(-1), lambda x: x + 1, torch.clone, repr):
        same = asked(got), asked(expected)
        assert same[0] == same[1] if isinstance(same[0], str) else torch.allclose(same[0].float(), same[1].float())
    assert got.value() is got.value()
    got[..., 3] = -1.0
    assert float(got[0, 0, 3].detach()) == -1.0
    weight = swapped.lm_head.weight
    (gradient,) = torch.autograd.grad(swapped(**inputs).logits.square().sum(), weight)
    (exact,) = torch.autograd.grad(model(**inputs).logits.square().sum(), model.lm_head.weight)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


def test_logits_of_weights_that_are_gone_are_refused() -> None:
    model = build()
    astrobiogen.swap_layers(model)
    out = model(**batch())
    before = model(**batch())
    assert before.logits.sum().isfinite()  # asked for in time
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert before.logits.sum().isfinite()
    with pytest.raises(RuntimeError, match="read them before the optimizer's step"):
        out.logits.sum()


def test_what_a_model_is_used_for_works_after_the_swap(tmp_path: Path) -> None:
    model = build(tie_word_embeddings=True).eval()
    inputs = batch()
    ids, expected = inputs["input_ids"], model(**inputs)
    settings = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    exact = [model.generate(ids, **settings, **more) for more in ({"do_sample": False}, {"num_beams": 3})]
    table = astrobiogen.swap_layers(model, only=("loss",))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.lm_head) is LazyHead
        torch.testing.assert_close(other(**inputs).loss, expected.loss)
    got = [model.generate(ids, **settings, **more) for more in ({"do_sample": False}, {"num_beams": 3})]
    assert all(torch.equal(one, two) for one, two in zip(got, exact, strict=True))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert type(again.lm_head) is nn.Linear
    torch.testing.assert_close(again(**inputs).loss, expected.loss)
    per_sample = torch.func.functional_call(model, dict(model.named_parameters()), kwargs=inputs).loss
    torch.testing.assert_close(per_sample, expected.loss)
    model.resize_token_embeddings(101)
    assert model(**inputs).loss.isfinite()
    table.restore()
    assert type(model.lm_head) is nn.Linear
    assert "_loss_function" not in model.__dict__


def test_a_head_that_is_more_than_a_plain_projection_is_left() -> None:
    hooked = build()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    biased = build()
    biased.lm_head = nn.Linear(48, 97)
    other = build()
    other.loss_function = lambda *_, **__: torch.zeros(())
    reasons = []
    for model in (hooked, biased, other):
        rows = [row for row in astrobiogen.swap_layers(model) if row.name.endswith("and loss")]
        reasons += [row.reason for row in rows]
        assert not [row for row in rows if row.now]
    assert reasons == ["it has hooks", "the output layer is a Linear with a bias"]


def test_a_traced_model_has_plain_logits() -> None:
    model = build().eval()
    astrobiogen.swap_layers(model, only=("loss",))
    head = torch.export.export(model.lm_head, (torch.randn(2, 3, 48),)).module()
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(head(x), model.lm_head(x).value())
    rows = torch.vmap(model.lm_head)(x)
    torch.testing.assert_close(rows, model.lm_head(x).value())
