"""report.html: one file with the figures and plots of a run, readable without a network."""

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from astrobiogen.training import final, metrics

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
td,th{border:1px solid #d0d7de;padding:.25rem .6rem;text-align:right}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:.4rem}figcaption{font-size:.85rem;color:#57606a;max-width:27rem}p.note{color:#57606a}
"""
_BLUE, _ORANGE, _GREY = "#1f6feb", "#d1661a", "#8c959f"


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, 3.4))
    return figure, figure.add_subplot()


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.{digits}f}"


def interval_text(interval: dict[str, Any]) -> str:
    """`0.812 [0.74, 0.88]`."""
    if interval["low"] is None:
        return _number(interval["value"])
    return f"{_number(interval['value'])} [{_number(interval['low'], 2)}, {_number(interval['high'], 2)}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _loss_curves(records: list[dict[str, Any]]) -> str:
    epochs = [record for record in records if record["event"] == "epoch"]
    steps = [record for record in records if record["event"] == "step" and isinstance(record["loss"], float)]
    figure, axis = _figure()
    axis.plot(
        [record["step"] for record in steps],
        [record["loss"] for record in steps],
        color=_GREY,
        linewidth=0.6,
        label="each update",
    )
    axis.plot(
        [record["step"] for record in epochs],
        [record["train"].get("loss") for record in epochs],
        color=_BLUE,
        marker=".",
        label="training",
    )
    axis.plot(
        [record["step"] for record in epochs],
        [record["validation"]["loss"] for record in epochs],
        color=_ORANGE,
        marker=".",
        label="validation",
    )
    best = [record for record in epochs if record["best"]]
    if best:
        axis.axvline(best[-1]["step"], color=_GREY, linestyle=":", label="best model")
    axis.set(xlabel="micro-batches", ylabel="total loss")
    axis.legend(frameon=False)
    return _image(figure, "Total loss, the same definition in training and validation.")


def _class_curves(records: list[dict[str, Any]]) -> str:
    epochs = [record for record in records if record["event"] == "epoch"]
    figure, axis = _figure()
    numbers = [record["epoch"] + 1 for record in epochs]
    for name, colour in (("accuracy", _BLUE), ("auroc", _ORANGE), ("class_loss", _GREY)):
        values = [record["validation"][name] for record in epochs]
        axis.plot(
            numbers,
            [value if isinstance(value, float) else math.nan for value in values],
            marker=".",
            color=colour,
            label=name,
        )
    axis.set(xlabel="epoch", ylabel="validation")
    axis.legend(frameon=False)
    return _image(figure, "Validation accuracy, AUROC and cross-entropy (nats).")


def _roc(predictions: dict[str, metrics.Predictions]) -> str:
    figure, axis = _figure()
    for (name, item), colour in zip(predictions.items(), (_BLUE, _ORANGE, _GREY, "#2da44e", "#8250df"), strict=False):
        order = np.argsort(-item.probability, kind="stable")
        positive = item.label[order] == 1
        if positive.all() or not positive.any():
            continue
        last = np.append(np.diff(item.probability[order]) != 0, True)
        true, false = np.cumsum(positive)[last] / positive.sum(), np.cumsum(~positive)[last] / (~positive).sum()
        axis.plot(np.append(0, false), np.append(0, true), color=colour, label=name, linewidth=1.3)
    axis.plot([0, 1], [0, 1], color=_GREY, linestyle=":")
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    axis.legend(frameon=False, fontsize=7)
    return _image(figure, "ROC on the test set.")


def _confusion(predictions: metrics.Predictions) -> str:
    counts = np.zeros((2, 2), int)
    np.add.at(counts, (predictions.label, (predictions.probability >= 0.5).astype(int)), 1)
    figure, axis = _figure()
    axis.imshow(counts, cmap="Blues")
    for row in range(2):
        for column in range(2):
            dark = counts[row, column] > counts.max() / 2
            axis.text(
                column, row, str(counts[row, column]), ha="center", va="center", color="white" if dark else "black"
            )
    axis.set(xticks=[0, 1], yticks=[0, 1], xlabel="predicted class", ylabel="true class")
    return _image(figure, "Confusion matrix on the test set, threshold one half.")


def _reliability(predictions: metrics.Predictions) -> str:
    figure, axis = _figure()
    edges = np.linspace(0, 1, 11)
    index = np.minimum((predictions.probability * 10).astype(int), 9)
    for number in range(10):
        members = index == number
        if members.any():
            axis.bar(
                edges[number],
                predictions.label[members].mean(),
                width=0.1,
                align="edge",
                color=_BLUE,
                alpha=0.55,
                edgecolor="white",
            )
            axis.text(edges[number] + 0.05, 0.02, str(members.sum()), ha="center", fontsize=6)
    axis.plot([0, 1], [0, 1], color=_GREY, linestyle=":")
    axis.set(xlabel="predicted probability of class 1", ylabel="observed share", xlim=(0, 1), ylim=(0, 1))
    return _image(figure, "Reliability diagram on the test set; the number of samples is written in each bar.")


def _bars(
    names: Sequence[str],
    values: Sequence[float],
    spread: Sequence[tuple[float, float]] | None,
    label: str,
    caption: str,
) -> str:
    figure, axis = _figure()
    positions = np.arange(len(names))
    axis.barh(positions, values, color=_BLUE, alpha=0.7)
    if spread:
        for position, (low, high) in zip(positions, spread, strict=True):
            axis.plot([low, high], [position, position], color="black", linewidth=1)
    axis.axvline(0, color=_GREY, linewidth=0.8)
    axis.set_yticks(positions, names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    return _image(figure, caption)


def figures_rows(result: dict[str, Any]) -> list[list[str]]:
    """The closing table: a row of model and of each baseline for each test cell."""
    rows: list[list[str]] = []
    for cell, figures in result["model"].items():
        methods = {"model": figures} | {name: item["cells"][cell] for name, item in result.get("baselines", {}).items()}
        for name, item in methods.items():
            rows.append(
                [
                    cell,
                    name,
                    str(item["samples"]),
                    *(interval_text(item[key]) for key in ("accuracy", "auroc", "loss", "ece")),
                ]
            )
    return rows


TABLE_HEAD = ("test cell", "method", "n", "accuracy", "AUROC", "cross-entropy", "ECE")


def _ablation(result: dict[str, Any]) -> str:
    ablation = result.get("ablation", {})
    if not ablation:
        return ""
    rows = [
        [
            name,
            interval_text(item["masked_minus_whole"]["accuracy"]),
            interval_text(item["masked_minus_whole"]["auroc"]),
            interval_text(item["masked_minus_whole"]["loss"]),
            verdict(item),
        ]
        for name, item in ablation.items()
    ]
    changes = [item["masked_minus_whole"]["loss"] for item in ablation.values()]
    plot = _bars(
        list(ablation),
        [change["value"] for change in changes],
        [(change["low"], change["high"]) for change in changes]
        if all(change["low"] is not None for change in changes)
        else None,
        "cross-entropy, masked minus whole",
        "What the trained model loses when a modality is masked at evaluation (right: it was of use). "
        "Lines: 95 % intervals.",
    )
    head = ("masked modality", "change of accuracy", "change of AUROC", "change of cross-entropy", "reading")
    return f"<h2>Ablation</h2>{_table(head, rows)}{plot}"


def verdict(item: dict[str, Any]) -> str:
    """Whether masking a modality made the cross-entropy worse, better, or neither outside the interval."""
    change = item["masked_minus_whole"]["loss"]
    if change["low"] is None:
        return "no interval"
    if change["low"] > 0:
        return "helps"
    return "harms" if change["high"] < 0 else "no effect shown"


def render(result: dict[str, Any], records: list[dict[str, Any]], predictions: dict[str, metrics.Predictions]) -> str:
    """The page.

    Args:
        result: what metrics.json holds.
        records: log.jsonl as `monitor.read_log` returns it.
        predictions: on the test set, "model" first, then baselines.
    """
    model = predictions["model"]
    weights = result.get("modality_weights", {})
    run = result["run"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Run {html.escape(result['preset'])}</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>Training run: {html.escape(result['preset'])}, seed {result['seed']}</h1>",
        f"<p>{run['parameters']:,} parameters, {run['epochs']} epochs, {run['updates']} updates "
        f"in {run['training_seconds']} s; "
        f"best epoch {run['best_epoch']}; ended: {html.escape(run['stopped'])}. "
        f"Data: {html.escape(str(result['data']))}.</p>",
        f"<h2>Test figures</h2>{_table(TABLE_HEAD, figures_rows(result))}<p class=note>"
        f"{html.escape(final.INTERVAL_METHOD)}. "
        "The label is made by a climate model, flux-balance analysis and growth ranges; "
        "it is not observed habitability.</p>",
        _roc(predictions),
        _confusion(model),
        _reliability(model),
        _ablation(result),
    ]
    if weights:
        parts.append(
            "<h2>Modality weights</h2>"
            + _bars(
                list(weights),
                list(weights.values()),
                None,
                "mean fusion weight",
                "Mean weight of each modality in the fusion, test set.",
            )
        )
    parts.append(
        f"<h2>Training</h2>{_loss_curves(records)}{_class_curves(records)}"
        if any(r["event"] == "epoch" for r in records)
        else ""
    )
    parts.append(f"<p class=note>Plots: matplotlib {matplotlib.__version__}.</p></html>")
    return "\n".join(parts)
