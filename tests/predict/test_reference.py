"""What a prediction is compared with: the region of the training data and the mistakes on the validation set."""

import numpy as np
import pytest

from astrobiogen import data
from astrobiogen.predict.calibration import Calibration
from astrobiogen.predict.domain import Domain, Region


def test_the_limit_is_the_largest_leave_one_out_distance() -> None:
    items = np.array([[0.0, 5.0], [1.0, 5.0], [3.0, 5.0]])
    region = Region.of(items)
    scale = items[:, 0].std()
    assert region.scale.tolist() == [scale, 1.0], "a feature that does not vary is not divided by zero"
    assert region.limit == pytest.approx(2.0 / scale / np.sqrt(2.0))  # 3 from 1, over two features
    assert region.distance(np.array([1.0, 5.0])) == 0.0
    assert region.distance(np.array([1.0, 7.0])) == pytest.approx(2.0 / np.sqrt(2.0))


def test_unknown_features_are_left_out_of_a_distance() -> None:
    region = Region.of(np.array([[0.0, 1.0], [2.0, np.nan], [4.0, 3.0]]))
    assert region.distance(np.array([2.0, np.nan])) == 0.0
    assert region.distance(np.array([np.nan, np.nan])) == np.inf


def test_training_items_lie_within_and_a_changed_climate_outside() -> None:
    training = data.load_bundled().train
    domain = Domain.of(training)
    store = training.store
    entry = store.planets[training.pairs[0].climate]
    inside = domain.of_climate(entry) | domain.of_network(store.organisms[training.pairs[0].organism])
    assert set(inside.values()) == {0.0}
    assert domain.reasons(inside) == []
    hot = domain.regions["climate"].items[0] + 10.0
    distance = {"climate": domain.regions["climate"].distance(hot)}
    assert "temperature and humidity" in domain.reasons(distance)[0]


def test_an_interval_covers_the_true_probability_of_an_overconfident_model() -> None:
    draws = np.random.default_rng(0)
    truth = draws.uniform(0.1, 0.9, 2000)
    labels = (draws.random(2000) < truth).astype(float)
    scores = np.clip(3.0 * (truth - 0.5) + 0.5, 0.01, 0.99)  # too sure of itself
    low, high = Calibration(scores, labels).interval(np.array([0.2, 0.5, 0.8]))
    assert (low <= high).all()
    expected = np.array([0.4, 0.5, 0.6])
    assert (np.abs((low + high) / 2 - expected) < 0.1).all()


def test_few_validation_pairs_give_a_wide_interval() -> None:
    few = Calibration(np.array([0.2, 0.8]), np.array([0.0, 1.0])).interval(np.array([0.5]))
    assert few[0][0] == 0.0
    assert few[1][0] == 1.0
