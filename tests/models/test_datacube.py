"""The datacube network: axes, padding, masks, sizes, features of full rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from astrobiogen import ops
from astrobiogen.models import DatacubeConfig, RebuiltDatacubeCNN, cube_from_legacy
from astrobiogen.models.common import trainable_parameters

CONFIG = DatacubeConfig(
    grid=(4, 3, 4, 8, 16), patch_size=(2, 1, 2, 2, 2), vit_patch_size=(2, 1, 1, 2, 4), base_channels=8,
    max_channels=16, depth=3, feature_dim=16, embed_dim=16, num_heads=2, num_transformer_layers=1,
)  # fmt: skip


def cube(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, *CONFIG.grid)


def test_unknown_names_raise() -> None:
    with pytest.raises(TypeError, match="use_cbam"):
        RebuiltDatacubeCNN(use_cbam=True)


@pytest.mark.parametrize("convolution", ["factorised", "dense"])
@pytest.mark.parametrize("latitude_padding", ["zeros", "pole"])
def test_gradient_reaches_every_parameter(convolution: str, latitude_padding: str) -> None:
    model = RebuiltDatacubeCNN(CONFIG, convolution=convolution, latitude_padding=latitude_padding)
    outputs = model(cube())
    (outputs["features"].sum() + outputs["reconstruction_loss"].sum() + outputs["physics_loss"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_switches_remove_exactly_their_parameters() -> None:
    whole = RebuiltDatacubeCNN(CONFIG)
    without_vit = RebuiltDatacubeCNN(CONFIG, use_vit_features=False)
    removed = trainable_parameters(whole) - trainable_parameters(without_vit)
    assert (
        removed == trainable_parameters(whole.vit) + 16 * 16
    )  # and the transformer's columns of the feature projection
    without_physics = RebuiltDatacubeCNN(CONFIG, use_physics_constraints=False)
    assert trainable_parameters(without_physics) == trainable_parameters(whole)  # budgets have nothing to learn
    assert without_physics(cube())["physics_violations"] == {}


def test_statistics_are_a_reading_of_their_own() -> None:
    model = RebuiltDatacubeCNN(CONFIG, statistics_thresholds=5)
    removed = trainable_parameters(model) - trainable_parameters(RebuiltDatacubeCNN(CONFIG))
    assert removed == trainable_parameters(model.read_statistics)
    x = cube(4)
    outputs = model(x)
    (outputs["features"].sum() + outputs["reconstruction_loss"].sum() + outputs["physics_loss"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    mirrored = model(x.flip(-1).roll(3, dims=-1))
    assert (outputs["features"] != outputs["statistics_features"]).any(1).all()
    torch.testing.assert_close(mirrored["statistics_features"], outputs["statistics_features"])
    assert not torch.allclose(mirrored["features"], outputs["features"])
    nearest = x.clone()
    nearest[:, 1:] += 1.0
    nearest[:, :, :, :, :-1] += 1.0
    nearest[:, :, :, :-1] += 1.0  # other variables, higher levels, earlier epochs
    torch.testing.assert_close(model(nearest)["statistics_features"], outputs["statistics_features"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics_thresholds": 4, "statistics_variables": ("wind",)}, "wind"),
        ({"statistics_thresholds": 4, "statistics_levels": 5}, "statistics_levels must be 1 to 4, got 5"),
        ({"statistics_thresholds": 1}, "thresholds must be at least 2"),
    ],
)
def test_wrong_statistics_raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RebuiltDatacubeCNN(CONFIG, **change)


def test_stem_is_a_strided_convolution() -> None:
    model = RebuiltDatacubeCNN(CONFIG)
    x = cube()
    weight = model.stem.weight.view(8, 2, *CONFIG.patch_size)
    expected = ops.conv_nd(x, weight, model.stem.bias, stride=CONFIG.patch_size)
    stages = model.stages[0]
    seen: list[torch.Tensor] = []
    stages.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(x)
    assert seen[0].shape == (2, 8, 2, 3, 2, 4, 8)
    torch.testing.assert_close(seen[0], expected)


def test_longitude_and_months_are_circles() -> None:
    model = RebuiltDatacubeCNN(CONFIG, depth=1, use_vit_features=False).eval()
    x = cube()
    for axis, step in ((-1, 2), (2, 2)):  # by one patch
        shifted = model(x.roll(step, dims=axis))["features"]
        torch.testing.assert_close(shifted, model(x)["features"])
    assert not torch.allclose(model(x.roll(2, dims=-2))["features"], model(x)["features"])


def test_absent_epochs_do_not_count() -> None:
    model = RebuiltDatacubeCNN(CONFIG).eval()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    x = cube() * mask[:, None, None, :, None, None, None]
    outputs = model(x, mask)
    assert not torch.allclose(outputs["features"][0], model(x)["features"][0])  # absent is not the same as average
    nothing = model(torch.zeros_like(x), torch.zeros_like(mask))
    assert torch.isfinite(nothing["features"]).all()
    assert nothing["reconstruction_loss"].tolist() == [0.0, 0.0]
    assert nothing["physics_loss"].tolist() == [0.0, 0.0]


def test_features_have_full_rank() -> None:
    model = RebuiltDatacubeCNN(CONFIG).eval()
    features = model(torch.randn(40, 2, *CONFIG.grid))["features"]
    centred = features - features.mean(0)
    assert torch.linalg.matrix_rank(centred).item() == 16
    assert features.std(1).min() > 0.1


def test_prediction_has_the_shape_of_the_input_and_explains_the_loss() -> None:
    model = RebuiltDatacubeCNN(CONFIG).eval()
    x = cube()
    outputs = model(x, return_prediction=True)
    assert outputs["prediction"].shape == x.shape
    expected = (outputs["prediction"] - x).square().mean((1, 2, 3, 4, 5, 6))
    torch.testing.assert_close(outputs["reconstruction_loss"], expected)
    found = model.budgets.violations(outputs["prediction"], x)
    torch.testing.assert_close(outputs["physics_violations"]["energy"], found["energy"])


def test_training_reconstructs() -> None:
    model = RebuiltDatacubeCNN(CONFIG)
    months = torch.linspace(0, 6.283, 4)
    x = (months.sin()[:, None, None, None, None] + torch.linspace(-1, 1, 8)[:, None]).expand(2, 2, 4, 3, 4, 8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        outputs = model(x)
        loss = outputs["reconstruction_loss"].mean() + outputs["physics_loss"].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_the_original_size_is_sane() -> None:
    with torch.device("meta"):
        model = RebuiltDatacubeCNN(input_variables=2, base_channels=128, depth=6)
    config = model.config
    assert config.stage_channels == (128, 256, 512, 512, 512, 512)
    assert config.deepest_grid == (2, 3, 5, 2, 2)
    assert trainable_parameters(model) == 38_629_056


def test_legacy_axes() -> None:
    old = torch.randn(1, 2, 12, 32, 64, 10)
    new = cube_from_legacy(old)
    assert new.shape == (1, 2, 12, 1, 10, 32, 64)
    assert torch.equal(new[0, 1, 4, 0, 7, 5], old[0, 1, 4, 5, :, 7])
    model = RebuiltDatacubeCNN(
        grid=(12, 1, 10, 32, 64),
        base_channels=8,
        depth=2,
        feature_dim=16,
        embed_dim=16,
        num_heads=2,
        num_transformer_layers=1,
    )
    assert model(new)["features"].shape == (1, 16)
    with pytest.raises(ValueError, match="6 axes"):
        cube_from_legacy(new)


def test_checkpointing_is_bitwise_equal_and_saves_bytes(saved_bytes: Callable[..., int]) -> None:
    x = cube()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = RebuiltDatacubeCNN(CONFIG, use_gradient_checkpointing=checkpointing, use_physics_constraints=False)
        held = saved_bytes(lambda model=model: model(x)["features"].sum())
        loss = model(x)["features"].sum()
        loss.backward()
        results.append((held, loss, [p.grad for p in model.parameters()]))
    (plain_bytes, plain_loss, plain_grads), (few_bytes, few_loss, few_grads) = results
    assert torch.equal(plain_loss, few_loss)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(plain_grads, few_grads))
    assert few_bytes <= 0.5 * plain_bytes


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 4, 3, 4, 8), "must have 7 axes"),
        ((2, 2, 4, 3, 4, 9, 16), "axis 'lat' has size 9, expected 8"),
        ((2, 2, 5, 3, 4, 8, 16), "axis 'climate_time'"),
        ((2, 3, 4, 3, 4, 8, 16), "axis 'variable'"),
    ],
)
def test_wrong_input_names_the_axis(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RebuiltDatacubeCNN(CONFIG)(torch.zeros(shape))


def test_pole_padding_keeps_longitude_even() -> None:
    with pytest.raises(ValueError, match="even number of longitudes behind the stem, got 1"):
        DatacubeConfig(grid=(4, 3, 4, 8, 16), patch_size=(2, 1, 2, 2, 16), latitude_padding="pole")
    config = DatacubeConfig(grid=(4, 3, 4, 8, 24), patch_size=(2, 1, 2, 1, 2), latitude_padding="pole")
    assert config.deepest_grid[4] == 6  # 12 behind the stem; halved again it would be odd


def test_wrong_patch_names_the_axis() -> None:
    with pytest.raises(ValueError, match="axis 'lev': 3 does not divide"):
        DatacubeConfig(patch_size=(3, 1, 3, 4, 4))
