"""A picture of predictions: climates down, networks across, what lies outside the training data crossed out."""

import math
from pathlib import Path

import numpy as np

from astrobiogen.predict.rows import OUTSIDE, Predictions
from astrobiogen.system import staging
from astrobiogen.system.extras import Later

figure = Later("matplotlib.figure")
_MOST_NAMES = 40  # on an axis: more cannot be read


def write_png(predictions: Predictions, path: Path) -> None:
    """Draw P(class 1) of every pair to `path`, which appears when it is whole. Grey: refused; a cross: outside the
    training data."""
    climates = list(dict.fromkeys(row.climate for row in predictions.rows))
    networks = list(dict.fromkeys(row.network for row in predictions.rows))
    values = np.full((len(climates), len(networks)), math.nan)
    crosses: list[tuple[int, int]] = []
    for row in predictions.rows:
        place = climates.index(row.climate), networks.index(row.network)
        values[place] = row.probability
        if row.flag == OUTSIDE:
            crosses.append(place)
    size = (min(4.0 + 0.22 * len(networks), 24.0), min(2.4 + 0.22 * len(climates), 24.0))
    drawn = figure.Figure(figsize=size, layout="constrained")
    axis = drawn.subplots()
    axis.set_facecolor("#e6e9ed")
    image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
    if crosses:
        down, across = zip(*crosses)
        axis.plot(across, down, "x", color="white", markersize=4, markeredgewidth=0.8)
    for which, names in ((axis.xaxis, networks), (axis.yaxis, climates)):
        shown = range(0, len(names), -(-len(names) // _MOST_NAMES))
        which.set_ticks(list(shown), [Path(names[k]).name[:28] for k in shown], fontsize=7)
    axis.tick_params(axis="x", rotation=90)
    axis.set_title("P(habitat); x: outside the training data, grey: refused", fontsize=9)
    drawn.colorbar(image, ax=axis, shrink=0.8)
    with staging.staged(path) as part:
        drawn.savefig(part, format="png", dpi=130)
