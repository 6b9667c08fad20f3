"""How climates approached balance: energy balance and surface temperature against model years."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from astrobiogen.data.errors import DataError
from astrobiogen.datatools.make_climate.jobs import YEAR, Segment, Settings, read_history

Runs = dict[str, tuple[float, list[Segment]]]  # by climate: length of a segment [model years], and the segments


def history_of(folder: Path) -> Runs:
    """The run in one work folder, under the folder's name; nothing when it has not ended a segment.

    Raises:
        DataError: Its files are damaged.
    """
    history = read_history(folder)
    if not history:
        return {}
    path = folder / "job.json"
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        return {folder.name: (job["steps"] * job["timestep"] / 1440.0 / YEAR, history)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(path, "steps, timestep", f"cannot be read ({error})") from error


def plot_histories(histories: Runs, path: Path, limit: float) -> None:
    """Write a PNG: net radiation at the top of the atmosphere with its limit, and mean surface temperature, at the end
    of each segment.

    Args:
        histories: By climate, as ``history_of`` gives them.
        path: File to write.
        limit: W/m2; largest imbalance that counts as balanced.
    """
    mpl.use("Agg")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhspan(-limit, limit, color="0.9", label=f"balanced: within {limit:g} W/m$^2$")
    for key, (length, history) in sorted(histories.items()):
        years = [(k + 1) * length for k in range(len(history))]
        left.plot(years, [s.toa_imbalance for s in history], "o-", ms=3, lw=1.2, label=key)
        right.plot(years, [s.ts_mean for s in history], "o-", ms=3, lw=1.2)
    left.set(xlabel="model years", ylabel="net radiation at the top [W/m$^2$]")
    right.set(xlabel="model years", ylabel="mean surface temperature [K]")
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe_runs(work: Path, path: Path) -> None:
    """The plot of every climate that ``make-climate`` has run in its work folder ``work``.

    Raises:
        DataError: There is none, or its files are damaged.
    """
    histories: Runs = {}
    for folder in sorted(p.parent for p in work.glob("*/history.json")):
        histories |= history_of(folder)
    if not histories:
        raise DataError(work, "*/history.json", "holds no run of make-climate")
    plot_histories(histories, path, Settings().max_imbalance)
