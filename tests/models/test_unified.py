"""The whole system: subsets of modalities, the loss and its weights, kernels, presets."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from astrobiogen.models import (
    MODALITIES,
    MultiModalTrainingConfig,
    UnifiedMultiModalSystem,
    compute_multimodal_loss,
    presets,
)
from astrobiogen.models.common import trainable_parameters

KEYS = {
    "climate": "climate_datacube",
    "graph": "metabolic_graph",
    "spectrum": "spectroscopy",
    "text": "input_ids",
    "planet_params": "planet_params",
}
Quiet = Callable[[MultiModalTrainingConfig], MultiModalTrainingConfig]
MakeBatch = Callable[..., dict[str, Any]]


@pytest.fixture
def config(spec: Any, quiet: Quiet) -> MultiModalTrainingConfig:
    return quiet(presets.tiny(spec))


@pytest.fixture
def system(config: MultiModalTrainingConfig) -> UnifiedMultiModalSystem:
    return UnifiedMultiModalSystem(config)


def loss_of(system: UnifiedMultiModalSystem, batch: dict[str, Any]) -> torch.Tensor:
    return compute_multimodal_loss(system(batch), batch, system.config)[0]


def test_unknown_names_raise(spec: Any) -> None:
    with pytest.raises(TypeError, match="use_rlhf"):
        UnifiedMultiModalSystem(presets.tiny(spec), use_rlhf=True)
    with pytest.raises(TypeError, match="use_8bit"):
        MultiModalTrainingConfig(use_8bit=True)


@pytest.mark.parametrize("size", [1, 3])
def test_outputs_and_gradients(system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch, size: int) -> None:
    batch = make_batch(size, spec)
    outputs = system(batch)
    loss, parts = compute_multimodal_loss(outputs, batch, system.config)
    loss.backward()
    assert outputs["logits"].shape == (size, 2)
    assert outputs["regression"].shape == (size,)
    assert outputs["modality_weights"].shape == (size, 5)
    assert set(parts) == {
        "classification", "regression", "reconstruction", "physics", "consistency", "llm", "graph", "total"
    }  # fmt: skip
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_subset_of_modalities_runs(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch, count: int
) -> None:
    """Left out as a key and masked per sample give the same answer, forward and backward."""
    system.eval()
    batch = make_batch(3, spec)
    for subset in itertools.combinations(MODALITIES, count):
        dropped = [KEYS[name] for name in MODALITIES if name not in subset]
        left_out = {key: value for key, value in batch.items() if key not in dropped}
        mask = torch.tensor([[name in subset for name in MODALITIES]]).expand(3, -1)
        with torch.no_grad():
            first, second = system(left_out), system(batch | {"modality_mask": mask})
            losses = [compute_multimodal_loss(out, batch, system.config)[0] for out in (first, second)]
        torch.testing.assert_close(first["logits"], second["logits"])
        torch.testing.assert_close(first["modality_weights"], second["modality_weights"])
        torch.testing.assert_close(*losses)
        assert torch.equal(first["present"], mask)
        assert torch.isfinite(losses[0])


def test_no_modality_at_all(system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(2, spec) | {"modality_mask": torch.zeros(2, 5, dtype=torch.bool)}
    loss = loss_of(system, batch)
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="none of the modalities"):
        system({"run_ids": torch.arange(2)})


def test_absent_in_single_samples_by_their_own_masks(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch
) -> None:
    batch = make_batch(3, spec)
    batch["climate_mask"][1] = False
    batch["climate_datacube"][1] = 0.0
    batch["graph_mask"][2] = False
    batch["spectroscopy_mask"][0] = False
    batch["attention_mask"][1] = False
    outputs = system.eval()(batch)
    expected = [[True, True, False, True, True], [False, True, True, False, True], [True, False, True, True, True]]
    assert outputs["present"].tolist() == expected
    assert ((outputs["modality_weights"] > 0).tolist()) == expected


@pytest.mark.parametrize("name", [field for field in dir(MultiModalTrainingConfig) if field.endswith("_weight")])
def test_every_weight_changes_the_loss(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch, name: str
) -> None:
    batch = make_batch(3, spec)
    with torch.no_grad():
        outputs = system.eval()(batch)
    base, parts = compute_multimodal_loss(outputs, batch, system.config)
    doubled = dataclasses.replace(system.config, **{name: 2.0 * getattr(system.config, name)})
    more, _ = compute_multimodal_loss(outputs, batch, doubled)
    weight = getattr(system.config, name)
    torch.testing.assert_close(more - base, weight * parts[name.removesuffix("_weight")], rtol=1e-3, atol=1e-5)
    assert more > base


def test_loss_is_the_same_in_training_and_evaluation(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch
) -> None:
    """Without dropout only the graph's latent sample and its negatives differ between the modes."""
    batch = make_batch(3, spec)
    with torch.no_grad():
        trained = compute_multimodal_loss(system.train()(batch), batch, system.config)[1]
        evaluated = compute_multimodal_loss(system.eval()(batch), batch, system.config)[1]
    for name in trained.keys() - {"graph", "total"}:
        torch.testing.assert_close(trained[name], evaluated[name])


def test_evaluation_is_deterministic_with_dropout_configured(spec: Any, make_batch: MakeBatch) -> None:
    system, batch = UnifiedMultiModalSystem(presets.tiny(spec)), make_batch(3, spec)
    assert not torch.equal(loss_of(system, batch), loss_of(system, batch))
    system.eval()
    assert torch.equal(loss_of(system, batch), loss_of(system, batch))


def test_order_of_samples_does_not_matter(system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(3, spec)
    order = torch.tensor([2, 0, 1])
    permuted = {key: value[order] for key, value in batch.items() if isinstance(value, torch.Tensor)}
    items = batch["metabolic_graph"].to_data_list()
    permuted["metabolic_graph"] = Batch.from_data_list([items[index] for index in order.tolist()])
    system.eval()
    torch.testing.assert_close(system(permuted)["logits"], system(batch)["logits"][order])


def test_repeated_cubes_and_graphs_may_be_given_once(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch
) -> None:
    batch = make_batch(3, spec)
    index = torch.tensor([1, 0, 1])
    items = batch["metabolic_graph"].to_data_list()
    full = batch | {
        "climate_datacube": batch["climate_datacube"][index],
        "climate_mask": batch["climate_mask"][index],
        "metabolic_graph": Batch.from_data_list([items[i] for i in index.tolist()]),
    }
    once = batch | {
        "climate_datacube": batch["climate_datacube"][:2],
        "climate_mask": batch["climate_mask"][:2],
        "climate_index": index,
        "metabolic_graph": Batch.from_data_list(items[:2]),
        "graph_index": index,
    }
    system.eval()
    torch.testing.assert_close(system(full)["logits"], system(once)["logits"])
    torch.testing.assert_close(loss_of(system, full), loss_of(system, once))


@pytest.mark.parametrize("name", MODALITIES)
def test_leaving_a_modality_out_removes_its_parameters(
    config: MultiModalTrainingConfig, spec: Any, make_batch: MakeBatch, name: str
) -> None:
    rest = tuple(other for other in MODALITIES if other != name)
    whole, smaller = UnifiedMultiModalSystem(config), UnifiedMultiModalSystem(config, modalities=rest)
    own = {key for key, _ in whole.named_parameters()} - {key for key, _ in smaller.named_parameters()}
    places = (
        "", "fusion.projections.", "fusion.modality_heads.", "text.modality_projections.",
        "summary_fusion.projections.",
    )  # fmt: skip
    more = {"climate": ("summary_fusion.score.",), "graph": ("summary_fusion.score.", "network_summary.")}
    allowed = (*(f"{place}{name}." for place in places), *more.get(name, ()))
    assert own
    assert all(key.startswith(allowed) for key in own)
    rows = config.fusion_config.fusion_dim + (0 if name == "text" else config.llm_config.hidden_size)  # type vectors
    rows += config.fusion_config.fusion_dim if name in ("climate", "graph") else 0  # of the fusion of summaries
    named = sum(value.numel() for key, value in whole.named_parameters() if key in own)
    assert trainable_parameters(whole) - trainable_parameters(smaller) == named + rows
    outputs = smaller(make_batch(2, spec))
    assert outputs["modality_weights"][:, MODALITIES.index(name)].abs().max() == 0


def curve_of(
    config: MultiModalTrainingConfig, batches: list[dict[str, Any]], kernels: str, seed: int, steps: int
) -> torch.Tensor:
    torch.manual_seed(seed)
    system = UnifiedMultiModalSystem(config, kernels=kernels)
    optimizer = torch.optim.AdamW(system.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(system, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_fifty_steps_with_fused_kernels_follow_the_reference(spec: Any, make_batch: MakeBatch) -> None:
    """Dropout, latent samples and negatives included; the difference must be below a tenth of the spread over seeds."""
    config = presets.tiny(spec)
    batches = [make_batch(3, spec, seed) for seed in range(4)]
    reference = torch.stack([curve_of(config, batches, "reference", seed, 50) for seed in range(3)])
    fused = curve_of(config, batches, "auto", 0, 50)
    spread = reference.std(0).mean()
    assert fused[-4:].mean() < 0.9 * fused[:4].mean()
    assert (fused - reference[0]).abs().max() < 0.1 * spread


# name of the switch and its value when off -> parameters that go, parameters that come, parameters that change shape
SWITCHES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "llm.use_scientific_reasoning": ({"use_scientific_reasoning": False}, r"text\.embed_domains\.weight", "", ""),
    "llm.use_rope": ({"use_rope": False}, "", r"text\.embed_positions\.weight", ""),
    "llm.use_gqa": ({"use_gqa": False}, "", "", r"text\.layers\.\d\.self_attn\.[kv]_proj\.weight"),
    "llm.use_rms_norm": ({"use_rms_norm": False}, "", r"text\.(layers\.\d\.\w*layer)?norm\.bias", ""),
    "llm.use_swiglu": (
        {"use_swiglu": False}, r"text\.layers\.\d\.mlp\.\w+_proj\.weight",
        r"text\.layers\.\d\.mlp\.\d\.(weight|bias)", "",
    ),
    "graph.use_biochemical_constraints": (
        {"use_biochemical_constraints": False}, r"graph\.decoder\.to_flux\.(weight|bias)", "", ""
    ),
    "graph.use_gradient_checkpointing": ({"use_gradient_checkpointing": True}, "", "", ""),
    "cnn.use_vit_features": ({"use_vit_features": False}, r"climate\.vit\..*", "", r"climate\.to_features\.weight"),
    "cnn.statistics_thresholds": (
        {"statistics_thresholds": 0},
        r"climate\.read_statistics\.\d\.\w+|summary_fusion\.(projections\.climate\.\w+|score\.weight)",
        "", r"summary_fusion\.types\.weight",
    ),
    "use_network_summary": (
        {"use_network_summary": False},
        r"network_summary\.read\.\d\.\w+|summary_fusion\.(projections\.graph\.\w+|score\.weight)",
        "", r"summary_fusion\.types\.weight",
    ),
    "summary_share": ({"summary_share": 0.0}, r"summary_fusion\..*", "", ""),
    "cnn.use_physics_constraints": ({"use_physics_constraints": False}, "", "", ""),
    "cnn.latitude_padding": ({"latitude_padding": "pole"}, "", "", ""),
    "cnn.convolution": (
        {"convolution": "dense"}, r"climate\.stages\.\d\.convolutions\.2\.(weight|bias)", "",
        r"climate\.stages\.\d\.convolutions\.\d\.weight",
    ),
    "fusion.use_adaptive_weighting": ({"use_adaptive_weighting": False}, r"(summary_)?fusion\.score\.weight", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_a_switch_touches_exactly_its_parameters_and_a_gradient_reaches_the_rest(
    make_spec: Any, make_batch: MakeBatch, quiet: Quiet, switch: str
) -> None:
    spec = make_spec((4, 3, 4, 8, 16))
    config = quiet(presets.tiny(spec))
    change, gone, come, resized = SWITCHES[switch]
    part = f"{switch.split('.')[0]}_config"
    inside = {part: dataclasses.replace(getattr(config, part), **change)} if "." in switch else change
    other = dataclasses.replace(config, **inside)
    before = {name: value.shape for name, value in UnifiedMultiModalSystem(config).named_parameters()}
    system = UnifiedMultiModalSystem(other)
    after = {name: value.shape for name, value in system.named_parameters()}

    def named(pattern: str, names: Iterable[str]) -> set[str]:
        found = {name for name in names if pattern and re.fullmatch(pattern, name)}
        assert found or not pattern
        return found

    assert before.keys() - after.keys() == named(gone, before)
    assert after.keys() - before.keys() == named(come, after)
    common = before.keys() & after.keys()
    assert {name for name in common if before[name] != after[name]} == named(resized, common)
    loss_of(system, make_batch(3, spec)).backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_reaches_every_parameter_of_small(make_spec: Any, make_batch: MakeBatch) -> None:
    spec = make_spec(tokens=8)
    system = UnifiedMultiModalSystem(presets.small(spec))
    loss_of(system, make_batch(3, spec)).backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_checkpointing_is_bitwise_equal_and_saves_half_of_the_bytes(
    make_spec: Any, make_batch: MakeBatch, quiet: Quiet, saved_bytes: Callable[..., int]
) -> None:
    """The `small` preset with every part's blocks recomputed, in evaluation mode."""
    spec = make_spec((12, 3, 10, 16, 32), tokens=24)
    config, batch = quiet(presets.small(spec)), make_batch(2, spec, graph_sizes=((60, 50), (30, 40)), wavelengths=64)
    parts = {name: getattr(config, name) for name in ("llm_config", "graph_config", "cnn_config")}
    recomputed = {name: dataclasses.replace(part, use_gradient_checkpointing=True) for name, part in parts.items()}
    torch.manual_seed(3)
    plain = UnifiedMultiModalSystem(config).eval()
    thrifty = UnifiedMultiModalSystem(dataclasses.replace(config, **recomputed)).eval()
    thrifty.load_state_dict(plain.state_dict())
    held = [saved_bytes(lambda system=system: loss_of(system, batch)) for system in (plain, thrifty)]
    losses = [loss_of(system, batch) for system in (plain, thrifty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, parameter), other in zip(plain.named_parameters(), thrifty.parameters()):
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad, other.grad), name
    assert 0.3 * held[0] <= held[1] <= 0.5 * held[0], held  # 21 of 44 MB


def test_compiles_to_one_graph(config: MultiModalTrainingConfig, spec: Any, make_batch: MakeBatch) -> None:
    """Forward, loss and backward; `fullgraph` refuses any graph break."""
    system, batch = UnifiedMultiModalSystem(config).eval(), make_batch(3, spec)
    loss = loss_of(system, batch)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in system.named_parameters()}
    system.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(system, batch)
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    for name, parameter in system.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_under_autocast(
    system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch, dtype: torch.dtype
) -> None:
    batch = make_batch(1, spec)
    full = loss_of(system.eval(), batch)
    with torch.autocast("cpu", dtype=dtype):
        half = loss_of(system, batch)
    half.backward()
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)


def test_presets_are_named_and_sized(make_spec: Callable[..., Any]) -> None:
    spec = make_spec((12, 3, 10, 32, 64), 4096, 128)
    bounds = {
        "tiny": (1e6, 1.5e6),
        "small": (25e6, 40e6),
        "a5000": (0.8e9, 0.95e9),
        "a5000x2": (1.8e9, 2e9),
        "original": (13.2e9, 13.4e9),
    }
    assert set(bounds) == set(presets.PRESETS)
    for name, (low, high) in bounds.items():
        with torch.device("meta"):
            system = UnifiedMultiModalSystem(presets.preset(name, spec))
        assert low < trainable_parameters(system) < high, name
    with pytest.raises(ValueError, match="huge"):
        presets.preset("huge", spec)


def test_wrong_batch_names_the_axis(system: UnifiedMultiModalSystem, spec: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(2, spec)
    for change, message in (
        ({"modality_mask": torch.ones(2, 4, dtype=torch.bool)}, "axis 'modality' has size 4, expected 5"),
        ({"spectroscopy": torch.zeros(3, 20, 2)}, "axis 'batch'"),
        ({"climate_datacube": torch.zeros(2, 2, 4, 3, 4, 8)}, "7 axes"),
        ({"planet_params": torch.zeros(2, 9)}, "axis 'parameter'"),
    ):
        with pytest.raises(ValueError, match=message):
            system(batch | change)


def test_the_tiny_preset_takes_any_choice_of_modalities(spec: Any, make_batch: MakeBatch) -> None:
    for chosen in (("climate",), ("graph", "text"), ("climate", "graph", "planet_params")):
        config = dataclasses.replace(presets.tiny(spec), modalities=chosen)
        with torch.no_grad():
            outputs = UnifiedMultiModalSystem(config).eval()(make_batch(2, spec))
        assert outputs["logits"].isfinite().all()
        read = [name in chosen for name in MODALITIES]
        assert ((outputs["modality_weights"] > 0) == torch.tensor(read)).all()
    wrong = dataclasses.replace(presets.tiny(spec).fusion_config, modality_dropouts={"sound": 0.5})
    with pytest.raises(ValueError, match="sound"):
        UnifiedMultiModalSystem(dataclasses.replace(presets.tiny(spec), fusion_config=wrong))
