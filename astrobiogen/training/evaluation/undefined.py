"""Figures that are not defined on a data set, said before training instead of found as NaN after it."""

import logging

import numpy as np

from astrobiogen import data
from astrobiogen.training.config import StopConfig
from astrobiogen.training.evaluation import metrics

_LOG = logging.getLogger("astrobiogen")


def figures(labels: metrics.Integers) -> tuple[str, ...]:
    """Those of `metrics.FIGURES` that are NaN on samples with these labels, whatever is predicted."""
    count = len(labels)
    even = np.full(count, 0.5), labels, np.arange(count), np.arange(count), ("",) * count
    found = metrics.figures(metrics.Predictions(*even))
    return tuple(name for name in metrics.FIGURES if not np.isfinite(found[name]).all())


def tell(bundle: data.DatasetBundle, stop: StopConfig) -> None:
    """Name, for the validation and test sets, the figures that are not defined there, and what follows for the choice
    of the best model.
    """
    sets = {"validation": bundle.validation, "test": bundle.test}
    sets |= {f"test, cell {name}": cell for name, cell in bundle.test_cells.items() if len(cell)}
    for name, samples in sets.items():
        labels = samples.labels().numpy()
        missing = figures(labels)
        if not missing:
            continue
        why = f"all {len(labels)} samples are of class {labels[0]}" if len(labels) else "there are no samples"
        known = tuple("cross-entropy" if figure == "loss" else figure for figure in missing)
        level = logging.INFO if "cell" in name else logging.WARNING
        _LOG.log(level, "%s: not defined, since %s: %s", name, why, ", ".join(known))
        if name == "validation" and stop.metric in missing:
            _LOG.warning(
                "stop.metric %s is not defined on the validation set: it chooses no best model and ends no run; the "
                "newest checkpoint will be examined (--stop.metric loss would choose)",
                stop.metric,
            )
