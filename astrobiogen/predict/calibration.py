"""An interval for the probability of a single model, from its own mistakes on the validation set (Venn-Abers)."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from astrobiogen.system.extras import Later

isotonic = Later("sklearn.isotonic")
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Scores of a model on pairs that it was not trained on, and their classes.

    Attributes:
        scores: P(class 1) that the model gave [n].
        labels: 0 or 1 [n].
    """

    scores: Floats
    labels: Floats

    def interval(self, scores: Floats) -> tuple[Floats, Floats]:
        """Lower and upper probability [m] of `scores` [m].

        The new score joins the validation scores once as class 0 and once as class 1; each time the increasing function
        that fits all classes best gives its probability. Whatever the model, one of the two is calibrated if validation
        and new pairs are exchangeable (Vovk, Petej & Fedorova 2015). Narrow: the validation set says much about such
        scores; an interval far from the score: the model is over- or underconfident there.
        """
        unique, place = np.unique(scores, return_inverse=True)
        ends = np.array([[self._fitted(score, label) for label in (0.0, 1.0)] for score in unique]).reshape(-1, 2)
        return ends[place, 0], ends[place, 1]

    def _fitted(self, score: float, label: float) -> float:
        fit = isotonic.IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        fit.fit(np.append(self.scores, score), np.append(self.labels, label))
        return float(fit.predict([score])[0])
