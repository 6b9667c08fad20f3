"""How the climates approached balance: energy balance and surface temperature against model years."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from astrobiogen.data.make_climate.jobs import YEAR, Segment, Settings


def plot_histories(histories: Mapping[str, list[Segment]], settings: Settings, path: Path) -> None:
    """Write a PNG: net radiation at the top of the atmosphere with the limit, and mean surface temperature, at the end
    of each segment.

    Parameters
    ----------
    histories
        Segments in order, by climate; a climate without any is left out.
    settings
        Those of the runs.
    path
        File to write.
    """
    mpl.use("Agg")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    limit = settings.max_imbalance
    left.axhspan(-limit, limit, color="0.9", label=f"balanced: within {limit:g} W/m$^2$")
    for key, history in sorted(histories.items()):
        if not history:
            continue
        years = [(k + 1) * settings.segment_days / YEAR for k in range(len(history))]
        left.plot(years, [s.toa_imbalance for s in history], "o-", ms=3, lw=1.2, label=key)
        right.plot(years, [s.ts_mean for s in history], "o-", ms=3, lw=1.2)
    left.set(xlabel="model years", ylabel="net radiation at the top [W/m$^2$]")
    right.set(xlabel="model years", ylabel="mean surface temperature [K]")
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
