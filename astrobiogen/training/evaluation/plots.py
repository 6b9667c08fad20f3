"""The plots of report.html, each as an HTML figure with the picture inside it."""

import base64
import html
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from astrobiogen.training.evaluation import metrics

BLUE, ORANGE, GREY, GREEN, PURPLE = "#1f6feb", "#d1661a", "#8c959f", "#2da44e", "#8250df"
_BINS = 10
_SMOOTHING = 0.95
Records = Sequence[Mapping[str, Any]]


def _figure(rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    for axis in axes if rows > 1 else [axes]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e9ed", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _values(records: Records, *keys: str) -> list[float]:
    """A nested number of each record; NaN where it is missing or was not finite."""
    result = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key, {}) if isinstance(value, Mapping) else None
        result.append(float(value) if isinstance(value, int | float) else math.nan)
    return result


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    result, average, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            average = _SMOOTHING * average + (1 - _SMOOTHING) * value
            weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(average / weight if weight else math.nan)
    return result


def of_event(records: Records, event: str) -> list[Mapping[str, Any]]:
    """The records of one kind."""
    return [record for record in records if record["event"] == event]


def loss_curves(records: Records) -> str:
    """Total loss of every update and of every validation."""
    steps, epochs = of_event(records, "step"), of_event(records, "epoch")
    figure, axis = _figure()
    losses = _values(steps, "loss")
    axis.plot(_values(steps, "step"), losses, color=GREY, linewidth=0.5, alpha=0.6, label="training, each update")
    axis.plot(_values(steps, "step"), _smoothed(losses), color=BLUE, linewidth=1.4, label="training, smoothed")
    validation = _values(epochs, "validation", "loss")
    axis.plot(_values(epochs, "step"), validation, color=ORANGE, marker="o", markersize=4, label="validation")
    best = [record for record in epochs if record["best"]]
    if best:
        axis.axvline(best[-1]["step"], color=GREEN, linestyle=":", label="best model")
    axis.set(xlabel="micro-batches", ylabel="total loss")
    axis.legend(frameon=False, fontsize=8)
    return _image(figure, "Total loss, the same definition in training and validation.")


def validation_curves(records: Records) -> str:
    """Accuracy, AUROC, calibration error and cross-entropy of every validation, with intervals."""
    epochs = of_event(records, "epoch")
    figure, axis = _figure()
    numbers = np.asarray(_values(epochs, "epoch")) + 1
    names = {"accuracy": ("accuracy", BLUE), "auroc": ("AUROC", ORANGE), "ece": ("ECE", PURPLE)}
    names["class_loss"] = ("cross-entropy (nats)", GREY)
    for number, (name, (label, colour)) in enumerate(names.items()):
        values = np.asarray(_values(epochs, "validation", name))
        key = "loss" if name == "class_loss" else name
        low = np.asarray(_values(epochs, "validation", "intervals", key, "low"))
        high = np.asarray(_values(epochs, "validation", "intervals", key, "high"))
        place = numbers + 0.04 * (number - 1.5)  # side by side, not on top of one another
        axis.plot(place, values, marker="o", markersize=4, color=colour, label=label)
        if np.isfinite(low).any():
            axis.vlines(place, low, high, color=colour, linewidth=1, alpha=0.7)
    axis.set(xlabel="epoch", ylabel="validation")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    return _image(figure, "Validation figures; lines: 95 % intervals (two-way cluster bootstrap).")


def optimisation(records: Records) -> str:
    """Learning rate and gradient norm of every update."""
    steps = of_event(records, "step")
    figure, (above, below) = _figure(2)
    place = _values(steps, "step")
    above.plot(place, _values(steps, "learning_rate"), color=BLUE)
    above.set_ylabel("learning rate", fontsize=9)
    norms = _values(steps, "gradient_norm")
    below.plot(place, norms, color=GREY, linewidth=0.6)
    below.plot(place, _smoothed(norms), color=BLUE, linewidth=1.3)
    skipped = [record["step"] for record in steps if record["skipped"]]
    if skipped:
        below.plot(skipped, [0.0] * len(skipped), "x", color=ORANGE, label="skipped")
        below.legend(frameon=False, fontsize=8)
    below.set_ylabel("gradient norm", fontsize=9)
    below.set_xlabel("micro-batches")
    return _image(figure, f"Learning rate, and gradient norm before clipping; {len(skipped)} updates skipped.")


def speed(records: Records) -> str:
    """Samples per second of every update."""
    steps = of_event(records, "step")
    figure, axis = _figure()
    rates = _values(steps, "speed", "samples_per_second")
    axis.plot(_values(steps, "step"), rates, color=BLUE, linewidth=0.9)
    axis.set(xlabel="micro-batches", ylabel="samples / s", ylim=(0, None))
    tokens, share = (np.nanmedian([math.nan, *_values(steps, "speed", name)]) for name in ("tokens_per_second", "mfu"))
    words = f"Samples per second, data loading included; median {np.nanmedian([math.nan, *rates]):,.1f}"
    words += f", {tokens:,.0f} text tokens per second" if math.isfinite(tokens) else ""
    words += f", {100 * share:.0f} % of the device's matrix-product rate" if math.isfinite(share) else ""
    return _image(figure, words + ".")


def gpus(records: Records) -> str:
    """Utilisation and memory, power and temperature of each card over time; nothing without readings."""
    readings = of_event(records, "gpu")
    if not readings:
        return ""
    hours = (np.asarray(_values(readings, "time")) - readings[0]["time"]) / 3600
    quantities = {
        "utilisation_percent": "utilisation (%)",
        "memory_used_mib": "memory (MiB)",
        "power_watts": "power (W)",
        "temperature_celsius": "temperature (°C)",
    }
    figure, axes = _figure(len(quantities))
    figure.set_size_inches(4.8, 6.0)
    for axis, (name, label) in zip(axes, quantities.items(), strict=True):
        for card, colour in zip(sorted(readings[0]["cards"]), (BLUE, ORANGE, GREEN, PURPLE) * 4, strict=False):
            axis.plot(hours, _values(readings, "cards", card, name), color=colour, linewidth=1, label=f"card {card}")
        axis.set_ylabel(label, fontsize=8)
    axes[0].legend(frameon=False, fontsize=8, ncols=4)
    axes[-1].set_xlabel("hours")
    return _image(figure, "Statistics of each GPU through NVML.")


def roc(predictions: Mapping[str, metrics.Predictions]) -> str:
    """ROC curves of the model and the baselines."""
    figure, axis = _figure()
    colours = itertools.cycle((BLUE, GREY, ORANGE, GREEN, PURPLE, "#bf3989", "#1b7c83"))
    for (name, item), colour in zip(predictions.items(), colours, strict=False):
        order = np.argsort(-item.probability, kind="stable")
        positive = item.label[order] == 1
        if positive.all() or not positive.any():
            continue
        last = np.append(np.diff(item.probability[order]) != 0, True)
        true, false = np.cumsum(positive)[last] / positive.sum(), np.cumsum(~positive)[last] / (~positive).sum()
        width = 2.0 if name == "model" else 1.1
        axis.plot(np.append(0, false), np.append(0, true), color=colour, label=name, linewidth=width)
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    axis.legend(frameon=False, fontsize=7)
    return _image(figure, "ROC on the test set.")


def confusion(predictions: metrics.Predictions) -> str:
    """Counts by true and predicted class."""
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (predictions.label, (predictions.probability >= 0.5).astype(int)), 1)
    figure, axis = _figure()
    axis.grid(False)
    axis.imshow(counts, cmap="Blues", vmin=0)
    for row in range(2):
        share = counts[row] / max(counts[row].sum(), 1)
        for column in range(2):
            colour = "white" if counts[row, column] > counts.max() / 2 else "black"
            text = f"{counts[row, column]}\n{100 * share[column]:.0f} %"
            axis.text(column, row, text, ha="center", va="center", color=colour)
    names = ["not habitable", "habitable"]
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks([0, 1], names)
    axis.set_yticks([0, 1], names, rotation=90, va="center")
    return _image(figure, "Confusion matrix on the test set, threshold one half; percentages of each true class.")


def reliability(predictions: metrics.Predictions, ece: str) -> str:
    """Observed share against predicted probability, with Wilson intervals; `ece` is the error as text."""
    figure, axis = _figure()
    edges = np.linspace(0, 1, _BINS + 1)
    index = metrics.bin_of(predictions.probability, _BINS)
    for number in range(_BINS):
        members = index == number
        count, positive = int(members.sum()), int(predictions.label[members].sum())
        if not count:
            continue
        centre = edges[number] + 0.5 / _BINS
        axis.bar(centre, positive / count, width=0.094, color=BLUE, alpha=0.45)
        low, high = metrics.wilson_lower(positive, count), 1 - metrics.wilson_lower(count - positive, count)
        axis.vlines(centre, low, high, color=BLUE, linewidth=1.2)
        axis.plot(predictions.probability[members].mean(), positive / count, "o", color=ORANGE, markersize=4)
        axis.text(centre, 1.02, str(count), ha="center", fontsize=7, color="#57606a")
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    axis.set(
        xlabel="predicted probability of the habitable class", ylabel="observed share", xlim=(0, 1), ylim=(0, 1.08)
    )
    caption = (
        "Reliability diagram on the test set: dots at the mean prediction of each bin, lines 95 % Wilson intervals, "
    )
    return _image(figure, f"{caption}numbers of samples on top. Expected calibration error {ece}.")


def bars(
    names: Sequence[str],
    values: Sequence[float],
    spread: Sequence[tuple[float, float]] | None,
    label: str,
    caption: str,
) -> str:
    """Horizontal bars, with intervals if there are any."""
    figure, axis = _figure()
    positions = np.arange(len(names))
    axis.barh(positions, values, color=BLUE, alpha=0.6, height=0.6)
    if spread:
        for position, (low, high) in zip(positions, spread, strict=True):
            axis.plot([low, high], [position, position], color="black", linewidth=1)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_yticks(positions, [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    return _image(figure, caption)
