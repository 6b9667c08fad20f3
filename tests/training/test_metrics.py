"""Figures against scikit-learn, intervals against their meaning."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from astrobiogen import data
from astrobiogen.training.evaluation import baselines, comparison, metrics


def predictions(count: int = 200, seed: int = 0, planets: int = 8, organisms: int = 10) -> metrics.Predictions:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, count)
    probability = np.round(
        np.clip(0.5 + 0.3 * (label - 0.5) + 0.25 * generator.standard_normal(count), 0.01, 0.99), 2
    )  # with ties
    planet, organism = generator.integers(0, planets, count), generator.integers(0, organisms, count)
    return metrics.Predictions(probability, label, planet, organism, tuple(f"c{number % 2}" for number in range(count)))


def test_figures_equal_scikit_learn() -> None:
    item = predictions()
    ours = {name: float(value[0]) for name, value in metrics.figures(item).items()}
    hard = (item.probability >= 0.5).astype(int)
    assert ours["accuracy"] == pytest.approx((hard == item.label).mean())
    assert ours["auroc"] == pytest.approx(roc_auc_score(item.label, item.probability))
    assert ours["loss"] == pytest.approx(log_loss(item.label, item.probability))
    assert ours["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(item.label, hard))


def test_weights_mean_repetition() -> None:
    item = predictions(40)
    weights = np.random.default_rng(1).integers(0, 4, (3, 40))
    for row in range(3):
        repeated = np.repeat(np.arange(40), weights[row])
        other = metrics.Predictions(
            item.probability[repeated],
            item.label[repeated],
            item.planet[repeated],
            item.organism[repeated],
            ("",) * len(repeated),
        )
        for name, value in metrics.figures(other).items():
            assert metrics.figures(item, weights.astype(float))[name][row] == pytest.approx(value[0]), name


def test_calibration_error_by_hand() -> None:
    item = metrics.Predictions(
        np.array([0.05, 0.05, 0.95, 0.95]), np.array([0, 1, 1, 1]), np.arange(4), np.arange(4), ("",) * 4
    )
    assert metrics.figures(item)["ece"][0] == pytest.approx((abs(0.5 - 0.05) * 2 + abs(1 - 0.95) * 2) / 4)


def test_one_class_has_no_auroc_and_says_so() -> None:
    item = metrics.Predictions(np.full(6, 0.3), np.zeros(6, int), np.arange(6), np.arange(6), ("",) * 6)
    result = metrics.with_intervals(item, 50, 0)
    assert math.isnan(result["auroc"].value)
    assert result["auroc"].replicates == 0
    assert result["auroc"].as_dict() == {"value": None, "low": None, "high": None, "replicates": 0}
    assert result["accuracy"].value == 1.0


def test_intervals_are_wider_for_fewer_groups_and_repeatable() -> None:
    few, many = predictions(400, planets=3, organisms=3), predictions(400, planets=100, organisms=100)

    def width(item: metrics.Predictions) -> float:
        interval = metrics.with_intervals(item, 400, 0)["accuracy"]
        assert interval.low <= interval.value <= interval.high
        return interval.high - interval.low

    # Right on all planets but one: with three planets, the share of that one varies from draw to draw.
    sure = np.where((few.planet == 0) == (few.label == 1), 0.1, 0.9)
    few = metrics.Predictions(sure, few.label, few.planet, few.organism, few.cell)
    assert width(few) > 1.5 * width(many)
    assert metrics.with_intervals(many, 50, 7) == metrics.with_intervals(many, 50, 7)


def test_paired_difference_of_equals_is_zero() -> None:
    item = predictions()
    assert all(value.low == value.high == 0.0 for value in metrics.differences(item, item, 30, 0).values())


def test_wilson_lower() -> None:
    assert metrics.wilson_lower(0, 0) == 0.0
    assert metrics.wilson_lower(96, 100) == pytest.approx(
        0.9016, abs=1e-3
    )  # Wilson 1927, as in statsmodels' proportion_confint


def features(count: int, seed: int, planets: int) -> baselines.Features:
    generator = np.random.default_rng(seed)
    params, flat = generator.standard_normal((count, 3)), generator.standard_normal((count, 5))
    planet, organism = generator.integers(0, planets, count), generator.integers(0, 6, count)
    label = (params[:, 0] + 0.2 * generator.standard_normal(count) > 0).astype(np.int64)
    flat[:, 0] = params[:, 0]
    groups = np.stack([[f"p{number}" for number in planet], [f"o{number}" for number in organism]], axis=1)
    return baselines.Features(params, flat, label, groups)


def test_baselines_on_summaries_learn_what_the_summaries_hold() -> None:
    def summarised(count: int, seed: int) -> baselines.Features:
        made = features(count, seed, planets=6)
        generator = np.random.default_rng(seed + 10)
        climate = np.hstack([made.params[:, :1], generator.standard_normal((count, 4))])
        return made._replace(climate=climate, network=generator.standard_normal((count, 20)))

    test = summarised(150, 2)
    made = baselines.predict(summarised(300, 0), summarised(80, 1), test, seed=0)
    names = [name for name in made if name.endswith("temperature shares + network")]
    assert len(names) == 2
    for name in names:
        assert ((made[name] > 0.5) == test.label).mean() > 0.8
        assert np.array_equal(made[name], baselines.predict(summarised(300, 0), summarised(80, 1), test, seed=0)[name])


def test_summary_features_of_a_known_temperature() -> None:
    """Half of the globe by area at -1, half at +1 standard deviations."""
    bundle = data.load_bundled()
    climate, network = data.summary_features(bundle.test)
    assert climate.shape == (len(bundle.test), 37)
    assert network.shape == (len(bundle.test), 131)
    assert np.isfinite(climate).all()
    assert (np.diff(climate[:, :28], axis=1) <= 1e-6).all()  # fewer are warmer than a higher threshold
    store, pair = bundle.test.store, bundle.test.pairs[0]
    entry = store.planets[pair.climate]
    spec = store.spec
    cube = list(entry.epochs)[-1].clone()  # type: ignore[union-attr]
    cube[spec.variables.index("ta"), :, -1] = -1.0
    cube[spec.variables.index("ta"), :, -1, : len(spec.latitudes) // 2] = 1.0
    planets = dict(store.planets) | {pair.climate: dataclasses.replace(entry, epochs=(cube,))}
    changed = data.HabitatDataset(dataclasses.replace(store, planets=planets), [pair], "test")
    row = data.summary_features(changed)[0][0]
    thresholds = np.linspace(-2.5, 3.0, 28)
    expected = np.where(thresholds < -1.0, 1.0, np.where(thresholds < 1.0, 0.5, 0.0))
    np.testing.assert_allclose(row[:28], expected, atol=1e-6)
    np.testing.assert_allclose(row[28], 0.0, atol=1e-6)
    np.testing.assert_allclose(row[[29, 35, 36]], [-1.0, 1.0, 1.0], atol=1e-6)


def test_baselines_learn_and_compare() -> None:
    test = features(150, 2, planets=9)  # planets 6 .. 8 are new
    made = baselines.predict(features(300, 0, 6), features(80, 1, 6), test, seed=0)
    assert set(made) == {
        "majority class",
        "logistic regression, planet parameters",
        "gradient boosting, all features",
        "planet + organism effects",
    }
    item = metrics.Predictions(
        made["logistic regression, planet parameters"],
        test.label,
        np.unique(test.groups[:, 0], return_inverse=True)[1],
        np.unique(test.groups[:, 1], return_inverse=True)[1],
        ("a",) * 150,
    )
    assert metrics.figures(item)["accuracy"][0] > 0.85
    compared = comparison.compare(item, made, 100, 0)
    assert all(item["better"] for item in comparison.against_majority(compared).values())
    same = compared["logistic regression, planet parameters"]["model_minus_baseline"]["accuracy"]
    assert same["low"] == same["high"] == 0.0
    wrong = metrics.Predictions(1 - item.probability, *list(vars(item).values())[1:])
    reversed_verdict = comparison.against_majority(comparison.compare(wrong, made, 100, 0))
    assert not any(item["better"] for item in reversed_verdict.values())
    assert all(item["worse"] for item in reversed_verdict.values())
