"""The comparison as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from astrobiogen.validate.curves import Curves
from astrobiogen.validate.rows import Row

COLOURS = {"float32": "#1f6feb", "bfloat16": "#d1661a", "float16": "#2da44e"}
SMALLEST = 1e-3  # what is drawn for an error of 0 on the logarithmic axis


def draw(path: Path, rows: Sequence[Row], curves: Curves, title: str) -> None:
    """Errors in units of what is allowed above, training curves below; one colour per dtype."""
    figure = Figure(figsize=(11, 9 if curves else 5), layout="constrained")
    axes = figure.subplots(2 if curves else 1, 1, squeeze=False)[:, 0]
    compared = [row for row in rows if row.kind != "training"]
    names = list(dict.fromkeys((row.kind, row.name) for row in compared))
    for row in compared:
        place = names.index((row.kind, row.name))
        for share, marker in ((row.forward, "o"), (row.backward, "^")):
            if share is not None and math.isfinite(share):
                axes[0].plot(place, max(share, SMALLEST), marker, color=COLOURS[row.dtype], markersize=5)
        if not row.ok:
            axes[0].axvspan(place - 0.5, place + 0.5, color="#ffd7d5", zorder=0)
    axes[0].axhline(1.0, color="black", linewidth=1)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("error / allowed (o forward, ^ backward)")
    axes[0].set_xticks(range(len(names)), [name for _, name in names], rotation=70, ha="right", fontsize=8)
    axes[0].set_title(title)
    for name, losses in curves.items():
        dtype, kernels = name.split(", ")
        style = {"linewidth": 1, "linestyle": "--"} if kernels == "kernels" else {"linewidth": 3, "alpha": 0.4}
        axes[1].plot(losses, color=COLOURS[dtype], label=name, **style)
    if curves:
        axes[1].set_xlabel("update")
        axes[1].set_ylabel("training loss")
        axes[1].legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=110)
