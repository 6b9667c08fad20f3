"""Every model on meta and on fake tensors: the same shapes, strides and dtypes as on real ones, with gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from astrobiogen.models import UnifiedMultiModalSystem, compute_multimodal_loss, presets

Call = Callable[[nn.Module, dict[str, Any]], Any]


def run_all(system: nn.Module, batch: dict[str, Any]) -> Any:
    outputs = system(batch)
    return outputs, compute_multimodal_loss(outputs, batch, system.config)[0]  # type: ignore[arg-type]


PARTS: dict[str, tuple[str, Call]] = {
    "system": ("", run_all),
    "text": ("text", lambda m, b: m(b["input_ids"], b["attention_mask"], b["labels"], return_logits=True)),
    "graph": ("graph", lambda m, b: m(b["metabolic_graph"])),
    "climate": ("climate", lambda m, b: m(b["climate_datacube"], b["climate_mask"], return_prediction=True)),
    "spectrum": ("spectrum", lambda m, b: m(b["spectroscopy"], b["spectroscopy_mask"])),
    "planet": ("planet_params", lambda m, b: m(b["planet_params"], b["planet_params_mask"])),
}


def moved(batch: dict[str, Any], move: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {
        key: move(value) if isinstance(value, torch.Tensor) else value.clone().apply(move)
        for key, value in batch.items()
    }


def description(model: nn.Module, call: Call, batch: dict[str, Any]) -> list[Any]:
    values = [value for value in tree_leaves(call(model, batch)) if isinstance(value, torch.Tensor)]
    sum(value.float().sum() for value in values if value.requires_grad).backward()  # type: ignore[union-attr]
    values += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [(value.shape, value.stride(), value.dtype) for value in values]


@pytest.mark.parametrize("part", PARTS)
def test_meta_and_fake_tensors(part: str, spec: Any, make_batch: Callable[..., dict[str, Any]]) -> None:
    name, call = PARTS[part]
    batch = make_batch(2, spec)

    def build() -> nn.Module:
        return UnifiedMultiModalSystem(presets.tiny(spec)).get_submodule(name).train(not name)

    expected = description(build(), call, batch)
    with torch.device("meta"):
        model = build()
    assert description(model, call, moved(batch, lambda tensor: tensor.to("meta"))) == expected
    mode = FakeTensorMode()
    fake = moved(batch, mode.from_tensor)
    with mode:
        assert description(build(), call, fake) == expected


def tables(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that no state dict holds."""
    kept = model.state_dict()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in kept}


def test_fixed_tables_are_whole_wherever_a_model_goes(spec: Any) -> None:
    """Area weights, budgets and rotary frequencies: neither rounded by a dtype nor lost by way of meta."""

    def build() -> nn.Module:
        return UnifiedMultiModalSystem(presets.tiny(spec))

    expected = tables(build())
    assert len(expected) > 8
    with torch.device("meta"):
        late = build()
    for model in (
        build().bfloat16(),
        build().half().float(),
        late.to_empty(device="cpu"),
        build().to("meta").to_empty(device="cpu"),
    ):
        found = tables(model)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype == torch.float32, name
            assert torch.equal(found[name], value), name
    assert tables(build().double())["climate.pool_weights"].dtype == torch.float64


def double(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    del module
    return 2 * output


def halved(layer: Any) -> None:
    """The same layer with half the weights and a hook that makes up for it."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    layer.register_forward_hook(double)


def test_what_hangs_on_a_part_counts(spec: Any, make_batch: Callable[..., dict[str, Any]]) -> None:
    """Half the weights and a hook that doubles the result, on every layer whose weight a model reads: no change."""
    batch = make_batch(2, spec)
    system = UnifiedMultiModalSystem(presets.tiny(spec)).eval()
    expected = run_all(system, batch)
    read = (
        system.climate.stem, system.climate.decoder.expand, system.climate.decoder.decode, system.text.lm_head,
        system.text.modality_types, system.fusion.types, system.graph.embed_structure.laplacian,
        system.graph.decoder.embed_structure.node_types,
    )  # fmt: skip
    for layer in read:
        if layer is system.text.lm_head and system.config.llm_config.tie_word_embeddings:
            continue
        halved(layer)
    got = run_all(system, batch)
    for before, after in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if isinstance(before, torch.Tensor) and before.is_floating_point():
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
