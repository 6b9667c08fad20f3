"""Small encoders and the fusion: masks, weights, subsets."""

import pytest
import torch

from astrobiogen.models import (
    FusionConfig,
    PlanetParameterEncoder,
    RebuiltMultimodalIntegration,
    SpectrumConfig,
    SpectrumEncoder,
)
from astrobiogen.models.common import trainable_parameters
from astrobiogen.models.multimodal_integration import _drop_modalities

DIMS = {"climate": 6, "graph": 5, "text": 4}
CONFIG = FusionConfig(
    fusion_dim=16, num_attention_heads=2, num_fusion_layers=2, num_latents=2, dropout=0.0, modality_dims=DIMS
)
SPECTRUM = SpectrumConfig(hidden_dim=16, queries=2, frequencies=4, feature_dim=8)


def features(batch: int = 3) -> dict[str, torch.Tensor]:
    return {name: torch.randn(batch, size) for name, size in DIMS.items()}


def test_unknown_names_raise() -> None:
    for cls in (RebuiltMultimodalIntegration, SpectrumEncoder, PlanetParameterEncoder):
        with pytest.raises(TypeError, match="quantum"):
            cls(quantum=True)
    with pytest.raises(ValueError, match="modality_dims"):
        RebuiltMultimodalIntegration()


def test_gradient_reaches_every_parameter() -> None:
    model = RebuiltMultimodalIntegration(CONFIG)
    outputs = model(features())
    (outputs["logits"].sum() + outputs["regression"].sum() + outputs["modality_logits"].square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_adaptive_weighting_off_removes_exactly_its_score() -> None:
    plain = RebuiltMultimodalIntegration(CONFIG, use_adaptive_weighting=False)
    assert trainable_parameters(RebuiltMultimodalIntegration(CONFIG)) - trainable_parameters(plain) == 16
    present = {"climate": torch.tensor([True, True, False])}
    weights = plain(features(), present)["modality_weights"]
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights[2], torch.tensor([0.0, 0.5, 0.5]))


def test_absent_modalities_have_no_influence_and_no_weight() -> None:
    model = RebuiltMultimodalIntegration(CONFIG).eval()
    given = features()
    present = {"graph": torch.tensor([True, False, False])}
    first = model(given, present)
    second = model(given | {"graph": torch.randn(3, 5)}, present)
    torch.testing.assert_close(first["logits"][1:], second["logits"][1:])
    assert not torch.allclose(first["logits"][0], second["logits"][0])
    assert first["modality_weights"][1:, 1].abs().max() == 0
    torch.testing.assert_close(first["modality_weights"].sum(1), torch.ones(3))
    left_out = model({name: value for name, value in given.items() if name != "graph"})
    torch.testing.assert_close(first["logits"][1:], left_out["logits"][1:])


def test_weights_take_part_in_the_result() -> None:
    model = RebuiltMultimodalIntegration(CONFIG).eval()
    given = features()
    before = model(given)["logits"]
    model.score.weight.data.mul_(-20.0)
    assert not torch.allclose(before, model(given)["logits"])


def test_a_sample_without_any_modality_is_defined() -> None:
    model = RebuiltMultimodalIntegration(CONFIG).eval()
    nothing = {name: torch.zeros(3, dtype=torch.bool) for name in DIMS}
    outputs = model(features(), nothing)
    assert torch.isfinite(outputs["logits"]).all()
    torch.testing.assert_close(outputs["logits"][0], outputs["logits"][1])
    assert outputs["modality_weights"].abs().max() == 0


def test_modality_dropout_keeps_one_and_only_what_is_there() -> None:
    mask = torch.rand(200, 5) > 0.4
    mask[0] = False
    kept = _drop_modalities(mask, [0.9] * 5)
    assert not (kept & ~mask).any()
    assert torch.equal(kept.any(1), mask.any(1))
    assert 1.0 <= kept[1:].sum(1).float().mean() < mask.sum(1).float().mean()


def test_modality_dropout_by_name() -> None:
    mask = torch.ones(4000, 2, dtype=torch.bool)
    share = _drop_modalities(mask, [0.0, 0.7]).float().mean(0)
    assert share[0] == 1.0
    assert abs(share[1] - 0.3) < 0.03  # four standard deviations of 4,000 draws
    model = RebuiltMultimodalIntegration(CONFIG, modality_dropout=0.2, modality_dropouts={"graph": 0.5})
    assert model.hiding == tuple(0.5 if name == "graph" else 0.2 for name in DIMS)
    with pytest.raises(ValueError, match="sound"):
        RebuiltMultimodalIntegration(CONFIG, modality_dropouts={"sound": 0.5})


def test_an_unfamiliar_modality_counts_as_hidden_in_evaluation() -> None:
    model = RebuiltMultimodalIntegration(CONFIG)
    given, known = features(4), torch.tensor([0.0, 0.25, 0.9, 1.0])
    hidden = {"graph": torch.zeros(4, dtype=torch.bool)}
    torch.testing.assert_close(model(given, familiarity={"graph": known})["logits"], model(given)["logits"])
    whole, part = model.eval()(given), model(given, hidden)
    outputs = model(given, familiarity={"graph": known})
    share = known[:, None]
    expected = share * whole["logits"].softmax(-1) + (1 - share) * part["logits"].softmax(-1)
    torch.testing.assert_close(outputs["logits"].softmax(-1), expected)
    torch.testing.assert_close(outputs["regression"], known * whole["regression"] + (1 - known) * part["regression"])
    torch.testing.assert_close(outputs["modality_weights"], whole["modality_weights"])
    # a sample that has nothing else is read as it is
    alone = {name: torch.zeros(4, dtype=torch.bool) for name in given if name != "graph"}
    torch.testing.assert_close(
        model(given, alone, {"graph": known})["logits"].softmax(-1), model(given, alone)["logits"].softmax(-1)
    )


def test_heads_of_single_modalities_are_a_switch() -> None:
    model = RebuiltMultimodalIntegration(CONFIG, use_modality_heads=False)
    whole = RebuiltMultimodalIntegration(CONFIG)
    gone = {name for name, _ in whole.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert gone
    assert all(name.startswith("modality_heads.") for name in gone)
    assert "modality_logits" not in model(features(2))


def test_results_are_in_range() -> None:
    outputs = RebuiltMultimodalIntegration(CONFIG)(features())
    assert outputs["logits"].shape == (3, 2)
    assert outputs["regression"].shape == (3,)
    assert ((outputs["regression"] > 0) & (outputs["regression"] < 1)).all()


def test_wrong_fusion_input_names_the_axis() -> None:
    model = RebuiltMultimodalIntegration(CONFIG)
    with pytest.raises(ValueError, match="axis 'feature' has size 7, expected 5"):
        model({"graph": torch.zeros(2, 7)})
    with pytest.raises(ValueError, match="sound"):
        model({"sound": torch.zeros(2, 7)})


def spectrum(batch: int = 3, length: int = 12) -> torch.Tensor:
    wave = torch.linspace(0.3, 20.0, length).expand(batch, -1)
    return torch.stack([wave, torch.randn(batch, length)], dim=-1)


def test_masked_points_do_not_count() -> None:
    model = SpectrumEncoder(SPECTRUM).eval()
    data, mask = spectrum(), torch.rand(3, 12) > 0.3
    poisoned = data.masked_fill(~mask[..., None], float("nan"))
    torch.testing.assert_close(model(poisoned, mask), model(data, mask))
    row = data[:1, mask[0]]
    torch.testing.assert_close(model(row), model(data, mask)[:1])
    assert torch.isfinite(model(data, torch.zeros_like(mask))).all()


def test_points_carry_their_wavelength() -> None:
    model = SpectrumEncoder(SPECTRUM).eval()
    data = spectrum()
    order = torch.randperm(12)
    torch.testing.assert_close(model(data[:, order]), model(data))  # a set of points, not a sequence
    moved = data.clone()
    moved[..., 0] += 0.5
    assert not torch.allclose(model(moved), model(data))


def test_small_encoders_use_every_parameter() -> None:
    planet = PlanetParameterEncoder(n_parameters=5, hidden_dim=8, feature_dim=6)
    known = torch.rand(3, 5) > 0.3
    for model, inputs in ((SpectrumEncoder(SPECTRUM), (spectrum(),)), (planet, (torch.randn(3, 5), known))):
        model(*inputs).square().mul(torch.randn(1)).sum().backward()
        (model(*inputs) * torch.randn(3, model.feature_dim)).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_missing_parameter_differs_from_the_mean() -> None:
    model = PlanetParameterEncoder(n_parameters=5, hidden_dim=8, feature_dim=6).eval()
    values = torch.randn(1, 5)
    values[0, 2] = 0.0
    mask = torch.ones(1, 5, dtype=torch.bool)
    unknown = mask.clone()
    unknown[0, 2] = False
    assert not torch.allclose(model(values, mask), model(values, unknown))
    other = values.clone()
    other[0, 2] = 9.0
    torch.testing.assert_close(model(other, unknown), model(values, unknown))


def test_wrong_small_input_names_the_axis() -> None:
    with pytest.raises(ValueError, match="axis 'channel' has size 3, expected 2"):
        SpectrumEncoder(SPECTRUM)(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="axis 'parameter' has size 4, expected 5"):
        PlanetParameterEncoder(n_parameters=5)(torch.zeros(1, 4))
