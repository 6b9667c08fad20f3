"""Figures of merit and their intervals.

The samples are not independent: one planet occurs with many organisms and one organism on many planets. Intervals
therefore come from the two-way cluster bootstrap (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007):
planets and organisms are each drawn with replacement, and a sample counts (times its planet was drawn) x (times its
organism was drawn). It is conservative, never too narrow on average.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

FIGURES = ("accuracy", "balanced_accuracy", "auroc", "loss", "ece")
_CONFIDENCE_TAIL = 2.5  # per cent on either side
_LOG_FLOOR = 1e-12
_BOOTSTRAP_FOR_TARGET = 500


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for one set of samples; all arrays have the same length n.

    Attributes:
        probability: of class 1, in [0, 1].
        label: 0 or 1.
        planet, organism: group numbers.
        cell: name of the test cell of each sample.
    """

    probability: Floats
    label: Integers
    planet: Integers
    organism: Integers
    cell: tuple[str, ...]

    def select(self, keep: npt.NDArray[np.bool_]) -> "Predictions":
        """The samples where `keep` is true."""
        return Predictions(
            self.probability[keep],
            self.label[keep],
            self.planet[keep],
            self.organism[keep],
            tuple(name for name, kept in zip(self.cell, keep, strict=True) if kept),
        )


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure, its 95 % interval and how many bootstrap replicates gave one (AUROC has none where a class is
    absent)."""

    value: float
    low: float
    high: float
    replicates: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.3f}{interval}"

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON data; NaN becomes null."""
        return {
            key: None if isinstance(item, float) and math.isnan(item) else item
            for key, item in dataclasses.asdict(self).items()
        }


def cross_entropy(probability: Floats, label: Integers) -> Floats:
    """Negative log likelihood of each sample in nats, probabilities kept away from 0 and 1 by 1e-12."""
    chosen = np.where(label == 1, probability, 1.0 - probability)
    return -np.log(np.maximum(chosen, _LOG_FLOOR))


def bin_of(probability: Floats, bins: int) -> Integers:
    """Number of the equal-width bin of each probability.

    Raises:
        ValueError: one of them is NaN or outside [0, 1], which no bin holds.
    """
    inside = (probability >= 0) & (probability <= 1)  # false for NaN
    if not inside.all():
        wrong = probability[~inside]
        raise ValueError(f"probability: got {wrong[0]!r} ({len(wrong)} of {len(inside)}), expected values in [0, 1]")
    return np.minimum((probability * bins).astype(np.int64), bins - 1)


def _weighted_auroc(score: Floats, label: Integers, weights: Floats) -> Floats:
    """AUROC for each row of `weights` [R, n]; ties count one half; NaN where a class has no weight."""
    order = np.argsort(score, kind="stable")
    sorted_score, positive, w = score[order], (label[order] == 1), weights[:, order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_score[1:] != sorted_score[:-1]]))
    positives = np.add.reduceat(w * positive, starts, axis=1)
    negatives = np.add.reduceat(w * ~positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + 0.5 * negatives)).sum(axis=1)
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(w), np.nan), where=pairs > 0)


def _weighted_ece(probability: Floats, label: Integers, weights: Floats, bins: int = 10) -> Floats:
    """Expected calibration error of P(class 1), equal-width bins: sum over bins of |observed share - mean probability|
    x bin weight.
    """
    member = np.zeros((len(probability), bins))
    member[np.arange(len(probability)), bin_of(probability, bins)] = 1.0
    gap = np.abs(weights @ (member * (label - probability)[:, None])).sum(axis=1)
    total = weights.sum(axis=1)
    return np.divide(gap, total, out=np.full(len(weights), np.nan), where=total > 0)


def figures(predictions: Predictions, weights: Floats | None = None) -> dict[str, Floats]:
    """Every figure of `FIGURES` for each row of `weights` [R, n] (default: one row of ones): name -> [R].

    Class 1 is predicted where the probability is at least one half. With a probability that is NaN or infinite every
    figure is NaN.
    """
    label, probability = predictions.label, predictions.probability
    if weights is None:
        weights = np.ones((1, len(label)))
    if not np.isfinite(probability).all():
        return {name: np.full(len(weights), np.nan) for name in FIGURES}
    total = weights.sum(axis=1)
    correct = ((probability >= 0.5) == (label == 1)).astype(np.float64)

    def mean(values: Floats, mask: Floats) -> Floats:
        bottom = weights @ mask
        return np.divide(weights @ (values * mask), bottom, out=np.full(len(weights), np.nan), where=bottom > 0)

    everything, positive = np.ones(len(label)), (label == 1).astype(np.float64)
    result = {
        "accuracy": mean(correct, everything),
        "balanced_accuracy": (mean(correct, positive) + mean(correct, 1 - positive)) / 2,
        "auroc": _weighted_auroc(probability, label, weights),
        "loss": mean(cross_entropy(probability, label), everything),
        "ece": _weighted_ece(probability, label, weights),
    }
    return {name: np.where(total > 0, value, np.nan) for name, value in result.items()}


def bootstrap_weights(planet: Integers, organism: Integers, replicates: int, seed: int) -> Floats:
    """Sample weights [replicates, n] of the two-way cluster bootstrap; replicates in which no sample is left are drawn
    again.
    """
    generator = np.random.default_rng(seed)
    planets, planet_index = np.unique(planet, return_inverse=True)
    organisms, organism_index = np.unique(organism, return_inverse=True)
    rows: list[Floats] = []
    while len(rows) < replicates:
        of_planet = generator.multinomial(len(planets), np.full(len(planets), 1 / len(planets)))
        of_organism = generator.multinomial(len(organisms), np.full(len(organisms), 1 / len(organisms)))
        row = (of_planet[planet_index] * of_organism[organism_index]).astype(np.float64)
        if row.sum() > 0:
            rows.append(row)
    return np.stack(rows) if rows else np.ones((0, len(planet)))


def _interval(value: float, draws: Floats) -> Interval:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return Interval(value, math.nan, math.nan, 0)
    low, high = np.percentile(finite, [_CONFIDENCE_TAIL, 100 - _CONFIDENCE_TAIL])
    return Interval(value, float(low), float(high), len(finite))


def with_intervals(predictions: Predictions, replicates: int, seed: int) -> dict[str, Interval]:
    """Each figure with its 95 % interval."""
    weights = bootstrap_weights(predictions.planet, predictions.organism, replicates, seed)
    values, draws = figures(predictions), figures(predictions, weights)
    return {name: _interval(float(values[name][0]), draws[name]) for name in FIGURES}


def differences(ours: Predictions, other: Predictions, replicates: int, seed: int) -> dict[str, Interval]:
    """ours - other for each figure, on the same samples and the same replicates (paired), with 95 % intervals."""
    weights = bootstrap_weights(ours.planet, ours.organism, replicates, seed)
    value_a, value_b = figures(ours), figures(other)
    draw_a, draw_b = figures(ours, weights), figures(other, weights)
    return {
        name: _interval(float(value_a[name][0] - value_b[name][0]), draw_a[name] - draw_b[name]) for name in FIGURES
    }


def wilson_lower(correct: int, total: int) -> float:
    """Lower end of the 95 % Wilson score interval of a proportion; 0 for no samples."""
    if total == 0:
        return 0.0
    z, share = 1.959963984540054, correct / total
    centre = share + z * z / (2 * total)
    return (centre - z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))) / (1 + z * z / total)


def accuracy_lower_bound(predictions: Predictions, seed: int) -> float:
    """The lower of the Wilson bound (right for independent samples) and the clustered bootstrap's (right for grouped
    ones), both 95 %; 0 if a probability is not finite.
    """
    count = len(predictions.label)
    if not np.isfinite(predictions.probability).all():
        return 0.0
    correct = int(((predictions.probability >= 0.5) == (predictions.label == 1)).sum())
    low = wilson_lower(correct, count)
    if low < 0.5:
        return low
    return min(low, with_intervals(predictions, _BOOTSTRAP_FOR_TARGET, seed)["accuracy"].low)
