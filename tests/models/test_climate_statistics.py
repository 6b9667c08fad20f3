"""Area-weighted shares against a double-precision loop, their symmetries and edges."""

import math

import pytest
import torch

from astrobiogen.models.datacube.physics import area_weights
from astrobiogen.models.datacube.statistics import FLOOR, ClimateStatistics

BOUNDS = (90.0, 60.0, 10.0, -20.0, -90.0)
LIMITS = (-2.0, 2.5)


def cube(batch: int = 3) -> torch.Tensor:
    return 1.5 * torch.randn(batch, 2, 6, 2, 3, 4, 8)


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[0], x.shape[3], dtype=torch.bool)


def test_shares_are_the_formula() -> None:
    statistics = ClimateStatistics(BOUNDS, (1,), levels=2, thresholds=7, limits=LIMITS)
    x = cube()
    step = (LIMITS[1] - LIMITS[0]) / 6
    field = x[:, 1:, :, -1, 1:].double().clamp(*LIMITS)
    area = area_weights(BOUNDS)
    found = statistics(x, everywhere(x))
    assert found.shape == (3, 1, 2, 7)
    for k in range(7):
        above = ((field - (LIMITS[0] + k * step)) / (2 * step) + 0.5).clamp(0.0, 1.0)
        share = torch.einsum("bvmzyx,y->bvz", above, area) / (6 * 8)
        odds = ((share + FLOOR) / (1 - share + FLOOR)).log() / 2
        torch.testing.assert_close(found[..., k].double(), odds, rtol=1e-5, atol=1e-6)


def test_symmetries() -> None:
    symmetric = (90.0, 40.0, 0.0, -40.0, -90.0)
    statistics = ClimateStatistics(symmetric, (0, 1), levels=3, thresholds=9)
    x = cube()
    expected = statistics(x, everywhere(x))
    for same in (x.roll(3, dims=-1), x.flip(-1), x.flip(-2), x.roll(2, dims=2), x.flip(2)):
        torch.testing.assert_close(statistics(same, everywhere(x)), expected)
    assert not torch.allclose(statistics(x.roll(1, dims=-2), everywhere(x)), expected)  # rows differ in area


def test_a_warmer_planet_has_larger_shares_and_values_far_outside_count_as_the_limits() -> None:
    statistics = ClimateStatistics(BOUNDS, (0, 1), levels=3, thresholds=9, limits=LIMITS)
    x = cube()
    assert (statistics(x + 0.3, everywhere(x)) >= statistics(x, everywhere(x))).all()
    hot, limit = (statistics(torch.full_like(x, value), everywhere(x)) for value in (1e6, LIMITS[1]))
    torch.testing.assert_close(hot, limit)
    largest = math.log((1 + FLOOR) / FLOOR) / 2
    assert hot[..., 0].max().item() == pytest.approx(largest, abs=1e-4)  # 1 / FLOOR amplifies rounding


def test_an_absent_epoch_gives_zeros_and_no_gradient_flows() -> None:
    statistics = ClimateStatistics(BOUNDS, (0,), levels=1, thresholds=4)
    x = cube().requires_grad_()
    mask = everywhere(x)
    mask[0, -1] = False
    found = statistics(x, mask)
    assert found[0].abs().max() == 0.0
    assert found[1:].abs().max() > 0.0
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": 1}, "thresholds must be at least 2, got 1"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"limits": (1.0, 1.0)}, "low < high"),
    ],
)
def test_wrong_settings_raise(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClimateStatistics(BOUNDS, (0,), **change)  # type: ignore[arg-type]


def test_wrong_latitudes_name_the_axis() -> None:
    x, statistics = cube(), ClimateStatistics((*BOUNDS[:-1], -50.0, -90.0), (0,))
    with pytest.raises(ValueError, match="axis 'lat' has size 4, expected 5"):
        statistics(x, everywhere(x))
