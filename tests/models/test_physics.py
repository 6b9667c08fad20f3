"""Budgets: right values, zero for a conserving field, seen by the gradient; patches agree with full fields."""

import itertools
import math

import pytest
import torch

from astrobiogen import ops
from astrobiogen.models import AtmosphereBudgets, DatacubeConfig
from astrobiogen.models.datacube.head import PatchBudgets, PatchDecoder, unpatchify
from astrobiogen.models.datacube.physics import HEAT_CAPACITY, LATENT_HEAT, area_weights

BOUNDS = (90.0, 50.0, 10.0, -20.0, -90.0)
SIGMA = (0.0, 0.2, 0.5, 1.0)
MEAN = ((210.0, 240.0, 270.0), (1e-5, 1e-3, 6e-3))
STD = ((10.0, 12.0, 15.0), (1e-5, 1e-3, 4e-3))


@pytest.fixture
def budgets() -> AtmosphereBudgets:
    return AtmosphereBudgets(("ta", "hus"), SIGMA, BOUNDS, 8, MEAN, STD, surface_pressure=9.81e4)


def standardised(temperature: torch.Tensor, humidity: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(table)[:, None, None, :, None, None] for table in (MEAN, STD))
    return ((torch.stack([temperature, humidity]) - mean) / std)[None]


def test_area_weights_are_those_of_the_sphere() -> None:
    area = area_weights(BOUNDS)
    expected = [math.sin(math.radians(a)) - math.sin(math.radians(b)) for a, b in itertools.pairwise(BOUNDS)]
    torch.testing.assert_close(area, torch.tensor(expected, dtype=torch.float64) / 2)


def test_budgets_of_a_uniform_atmosphere(budgets: AtmosphereBudgets) -> None:
    shape = (2, 3, 3, 4, 8)
    field = standardised(torch.full(shape, 250.0), torch.full(shape, 2e-3))
    water, energy = budgets.budgets(field)
    mass = 9.81e4 / 9.81  # kg per square metre of the whole column
    torch.testing.assert_close(water, torch.full((1, 2, 3), mass * 2e-3), rtol=1e-5, atol=0.0)
    expected = mass * (HEAT_CAPACITY * 250.0 + LATENT_HEAT * 2e-3)
    torch.testing.assert_close(energy, torch.full((1, 2, 3), expected), rtol=1e-5, atol=0.0)


def test_moving_water_and_heat_conserves(budgets: AtmosphereBudgets) -> None:
    field = 0.1 * torch.randn(2, 2, 4, 3, 3, 4, 8)
    moved = field.roll(3, dims=-1)  # along longitude
    for name, value in budgets.violations(moved, field).items():
        assert value.abs().max() < 1e-12, name
    column = SIGMA[3] - SIGMA[2], SIGMA[2] - SIGMA[1]
    area = area_weights(BOUNDS)
    swapped = field.clone()  # one kilogram of water from the lowest level of one row to the middle level of another
    swapped[:, 1, :, :, 2, 1] -= 0.01 / (column[0] * float(area[1]) * STD[1][2])
    swapped[:, 1, :, :, 1, 2] += 0.01 / (column[1] * float(area[2]) * STD[1][1])
    assert budgets.violations(swapped, field)["water"].max() < 1e-9
    assert budgets.violations(swapped + 0.01, field)["water"].min() > 5e-5


def test_isolated_atmosphere_must_be_constant_over_the_months(budgets: AtmosphereBudgets) -> None:
    constant = 0.1 * torch.randn(1, 2, 1, 3, 3, 4, 8).expand(-1, -1, 6, -1, -1, -1, -1)
    still = budgets.violations(constant)
    assert still["water"].item() < 1e-12
    assert still["energy"].item() < 1e-12
    seasonal = constant + torch.linspace(-1, 1, 6)[:, None, None, None, None]
    assert budgets.violations(seasonal)["energy"].item() > 0.1


def test_violation_units_epochs_and_negative_humidity(budgets: AtmosphereBudgets) -> None:
    field = torch.zeros(1, 2, 2, 3, 3, 4, 8)
    found = budgets.violations(field + 1.0, field)
    assert found["water"].item() == pytest.approx(1.0, rel=1e-5)  # one standard deviation everywhere
    assert found["energy"].item() == pytest.approx(1.0, rel=1e-5)
    assert found["negative_humidity"].item() == 0.0
    broken = field.clone()
    broken[:, :, :, 0] += 5.0
    assert budgets.violations(broken, field, torch.tensor([[False, True, True]]))["water"].item() == 0.0
    dry = field.clone()
    dry[:, 1] = -3.0
    assert budgets.violations(dry, field)["negative_humidity"].item() > 0.1


def test_gradients(budgets: AtmosphereBudgets) -> None:
    reference = 0.3 * torch.randn(1, 2, 1, 1, 3, 4, 8)
    field = (reference + 0.3 * torch.randn_like(reference)).requires_grad_()
    found = budgets.violations(field, reference)
    grads = torch.autograd.grad(found["water"].sum() + found["energy"].sum(), field)
    assert grads[0][:, 1].abs().min() > 0  # humidity enters both budgets
    assert grads[0][:, 0].abs().min() > 0


def test_wrong_input_names_the_axis(budgets: AtmosphereBudgets) -> None:
    with pytest.raises(ValueError, match="axis 'lat' has size 5, expected 4"):
        budgets.budgets(torch.zeros(1, 2, 1, 1, 3, 5, 8))
    with pytest.raises(ValueError, match="'hus'"):
        AtmosphereBudgets(("ta", "ua"), SIGMA, BOUNDS, 8, MEAN, STD)


def patches_of(cube: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """[B, *grid, V · Π patch], what a convolution with kernel = stride = patch sees."""
    size = cube.shape[1] * math.prod(patch)
    picks = torch.eye(size).view(size, cube.shape[1], *patch)
    return ops.conv_nd(cube, picks, stride=patch).movedim(1, -1)


def test_unpatchify_puts_patches_side_by_side() -> None:
    cube = torch.randn(2, 3, 4, 2, 6, 4, 8)
    patch = (2, 1, 3, 2, 4)
    patches = patches_of(cube, patch)
    assert patches.shape == (2, 2, 2, 2, 2, 2, 3 * 48)
    assert torch.equal(patches[1, 0, 1, 1, 0, 1], cube[1, :, :2, 1:2, 3:, :2, 4:].flatten())
    assert torch.equal(unpatchify(patches, patch), cube)


def test_patch_errors_and_budgets_equal_those_of_the_decoded_field() -> None:
    config = DatacubeConfig(
        grid=(4, 2, 3, 4, 8), patch_size=(2, 1, 1, 2, 4), vit_patch_size=(1, 1, 1, 1, 1), base_channels=6, depth=1,
        level_bounds=SIGMA, latitude_bounds=BOUNDS, cube_mean=MEAN, cube_std=STD,
    )  # fmt: skip
    budgets = AtmosphereBudgets(config.variables, SIGMA, BOUNDS, 8, MEAN, STD)
    decoder, summed = PatchDecoder(6, config), PatchBudgets(budgets, config)
    deep, cube = torch.randn(2, 6, 2, 2, 3, 2, 2), torch.randn(2, 2, 4, 2, 3, 4, 8)
    rows, field = decoder.rows(decoder.hidden(deep)), decoder(deep)
    image = patches_of(cube, config.patch_size) @ decoder.weight()
    error = decoder.squared_error(rows, image, cube).mean((1, 2))
    torch.testing.assert_close(error, (field - cube).square().mean((1, 2, 3, 4, 5, 6)))
    water, energy, _ = summed(decoder, rows, *budgets.anomaly(cube))
    found = budgets.violations(field, cube)
    torch.testing.assert_close(water.square().mean((1, 2)), found["water"])
    torch.testing.assert_close(energy.square().mean((1, 2)), found["energy"])
    full = torch.autograd.grad((field - cube).square().mean(), decoder.decode.weight, retain_graph=True)[0]
    short = torch.autograd.grad(error.mean(), decoder.decode.weight)[0]
    torch.testing.assert_close(short, full)


def test_negative_patches_are_a_violation() -> None:
    config = DatacubeConfig(
        grid=(4, 2, 3, 4, 8), patch_size=(2, 1, 1, 2, 4), vit_patch_size=(1, 1, 1, 1, 1), base_channels=6, depth=1,
        level_bounds=SIGMA, latitude_bounds=BOUNDS, cube_mean=MEAN, cube_std=STD,
    )  # fmt: skip
    budgets = AtmosphereBudgets(config.variables, SIGMA, BOUNDS, 8, MEAN, STD)
    decoder, summed = PatchDecoder(6, config), PatchBudgets(budgets, config)
    torch.nn.init.zeros_(decoder.decode.weight)
    hidden = torch.randn(1, 2, 2, 3, 2, 2, 6)
    rows = decoder.rows(hidden)
    given = torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)
    decoder.decode.bias.data.fill_(0.0)
    assert summed(decoder, rows, *given)[2].abs().max() == 0.0
    decoder.decode.bias.data.fill_(-3.0)
    dry = summed(decoder, rows, *given)[2]
    full = budgets.violations(decoder(hidden.new_zeros(1, 6, 2, 2, 3, 2, 2)), torch.zeros(1, 2, 4, 2, 3, 4, 8))
    torch.testing.assert_close(dry.square().mean((1, 2)), full["negative_humidity"])
