"""report.html: one file with the figures and plots of a run, readable without a network."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from astrobiogen.training.evaluation import comparison, metrics, plots

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #d0d7de}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.card{border:1px solid #d0d7de;border-radius:8px;padding:.6rem 1rem;min-width:9rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}.card span{color:#57606a;font-size:.85rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums;font-size:.9rem}
td,th{border-bottom:1px solid #d0d7de;padding:.25rem .7rem;text-align:right;white-space:nowrap}
th{color:#57606a;font-weight:600}td.left,th.left{text-align:left}tr.model td{background:#ddf4ff;font-weight:600}
.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;flex:0 1 25rem;min-width:min(22rem,100%)}img{width:100%}
figcaption{font-size:.85rem;color:#57606a}p.note{color:#57606a;font-size:.9rem}
"""
MOST_RECORDS = 4000  # of each kind in the plots: more than they have pixels
TABLE_HEAD = ("test cell", "method", "n", "accuracy", "AUROC", "cross-entropy", "ECE")
_NAMES = {"accuracy": "accuracy", "auroc": "AUROC", "loss": "cross-entropy (nats)", "ece": "calibration error (ECE)"}


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.{digits}f}"


def interval_text(interval: Mapping[str, Any]) -> str:
    """`0.812 [0.74, 0.88]`."""
    if interval["low"] is None:
        return _number(interval["value"])
    return f"{_number(interval['value'])} [{_number(interval['low'], 2)}, {_number(interval['high'], 2)}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, marked: str = "") -> str:
    """Cells of the first `left` columns to the left; rows whose second cell is `marked` stand out."""

    def line(cells: Sequence[str], tag: str) -> str:
        kind = ' class="model"' if marked and tag == "td" and cells[1] == marked else ""
        content = "".join(
            f"<{tag}{' class=left' if number < left else ''}>{html.escape(cell)}</{tag}>"
            for number, cell in enumerate(cells)
        )
        return f"<tr{kind}>{content}</tr>"

    return f'<div class="scroll"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def figures_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The closing table: a row of model and of each baseline for each test cell."""
    rows: list[list[str]] = []
    for cell, figures in result["model"].items():
        others = {
            **result.get("baselines", {}),
            **({comparison.CONTROL: result["control"]} if "control" in result else {}),
        }
        methods = {"model": figures} | {name: item["cells"][cell] for name, item in others.items()}
        for name, item in methods.items():
            values = [interval_text(item[key]) for key in ("accuracy", "auroc", "loss", "ece")]
            rows.append([cell, name, str(item["samples"]), *values])
    return rows


def _figures(result: Mapping[str, Any]) -> str:
    """The closing table with the name of a test cell on its first row only."""
    rows = figures_rows(result)
    named = [[cell if cell != before[0] else "", *rest] for before, (cell, *rest) in zip([[""], *rows], rows)]
    return _table(TABLE_HEAD, named, 2, "model")


def verdict(item: Mapping[str, Any]) -> str:
    """Whether masking a modality made the cross-entropy worse, better, or neither outside the interval."""
    change = item["masked_minus_whole"]["loss"]
    if change["low"] is None:
        return "no interval"
    if change["low"] > 0:
        return "helps"
    return "harms" if change["high"] < 0 else "no effect shown"


def _ablation(result: Mapping[str, Any]) -> str:
    ablation = result.get("ablation", {})
    if not ablation:
        return ""
    rows = [
        [
            name,
            *(interval_text(item["masked_minus_whole"][key]) for key in ("accuracy", "auroc", "loss")),
            verdict(item),
        ]
        for name, item in ablation.items()
    ]
    changes = [item["masked_minus_whole"]["loss"] for item in ablation.values()]
    whole = all(change["low"] is not None for change in changes)
    plot = plots.bars(
        list(ablation),
        [change["value"] for change in changes],
        [(change["low"], change["high"]) for change in changes] if whole else None,
        "cross-entropy, masked minus whole",
        "What the trained model loses when a modality is masked at evaluation (right: it was of use). "
        "Lines: 95 % intervals.",
    )
    head = ("masked modality", "change of accuracy", "change of AUROC", "change of cross-entropy", "reading")
    return f'<h2>Ablation</h2>{_table(head, rows)}<div class="plots">{plot}</div>'


def _cards(result: Mapping[str, Any]) -> str:
    figures = result["model"][comparison.ALL_CELLS]
    cards = []
    for key, name in _NAMES.items():
        low, high = figures[key]["low"], figures[key]["high"]
        interval = "" if low is None else f"95 %: {_number(low, 2)} to {_number(high, 2)}"
        cards.append(
            f'<div class="card"><span>{name}</span><b>{_number(figures[key]["value"])}</b><span>{interval}</span></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _memory(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    planned, measured = report["planned_bytes"], report["measured_bytes"]
    rows = [[name, f"{planned[name] / 2**20:,.1f}", f"{measured[name] / 2**20:,.1f}"] for name in measured]
    share = f"{report['measured_over_planned']:.2f} of the plan"
    note = f"Peak of one update on {report['device']}: {share} ({report['method']})."
    return f"<h2>Memory</h2>{_table(('MiB', 'planned', 'measured'), rows)}<p class=note>{html.escape(note)}</p>"


def _environment(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return ""
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    names = ("started", "astrobiogen", "git", "python", "system", "processor", "cpus")
    rows = [[name, str(facts[name])] for name in names if facts.get(name)]
    rows += [
        ["runtime", ", ".join(f"{key} {value}" for key, value in facts["runtime"].items())],
        ["libraries", libraries],
    ]
    rows.append(["command", " ".join(facts["command"])])
    return f"<h2>Environment</h2>{_table(('', ''), rows, left=2)}"


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    if not plots.of_event(records, "epoch"):
        return ""
    drawn = (plots.loss_curves, plots.validation_curves, plots.optimisation, plots.speed)
    pictures = [*(plot(records) for plot in drawn), plots.gpus(records)]
    steps = plots.of_event(records, "step")
    every = round((steps[-1].get("update", 0) - steps[0].get("update", 0)) / max(len(steps) - 1, 1)) if steps else 1
    note = f"<p class=note>Of the updates about one in {every} is drawn, and all that were skipped.</p>"
    return f'<h2>Training</h2>{note if every > 1 else ""}<div class="plots">{"".join(pictures)}</div>'


def _weights(result: Mapping[str, Any]) -> str:
    weights = result.get("modality_weights", {})
    if not weights:
        return ""
    caption = "Mean weight of each modality in the fusion, test set."
    names, values = list(weights), list(weights.values())
    plot = plots.bars(names, values, None, "mean fusion weight", caption)
    return f'<h2>Modality weights</h2><div class="plots">{plot}</div>'


def _weights_taken(run: Mapping[str, Any]) -> str:
    """Which weights the figures are of."""
    if run["best_epoch"] is not None:
        return f"best epoch {run['best_epoch']}"
    taken = run["weights"]
    reason = f", which stands in for the best model ({taken['reason']})" if "reason" in taken else ""
    return f"figures of {taken['checkpoint']}, epoch {taken['epoch']}{reason}"


def render(
    result: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, metrics.Predictions],
    memory: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        result: what metrics.json holds.
        records: log.jsonl as `monitor.read_log` returns it, or thinned.
        predictions: on the test set, "model" first, then baselines.
        memory, environment: what memory_report.json and environment.json hold, if there are such files.
    """
    model, run = predictions["model"], result["run"]
    ece = interval_text(result["model"][comparison.ALL_CELLS]["ece"])
    title = f"{html.escape(result['preset'])}, seed {result['seed']}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Run {title}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>Training run: {title}</h1>",
        f"<p>{run['parameters']:,} parameters, {run['epochs']} epochs, {run['updates']} updates "
        f"in {run['training_seconds']} s; {html.escape(_weights_taken(run))}; ended: {html.escape(run['stopped'])}. "
        f"Data: {html.escape(str(result['data']))}.</p>",
        _cards(result),
        f"<h2>Test figures</h2>{_figures(result)}<p class=note>"
        f"{html.escape(comparison.INTERVAL_METHOD)}. The label is made by a climate model, flux-balance analysis and "
        "growth ranges; it is not observed habitability.</p>",
        f'<div class="plots">{plots.roc(predictions)}{plots.confusion(model)}{plots.reliability(model, ece)}</div>',
        _ablation(result),
        _weights(result),
        _training(records),
        _memory(memory),
        _environment(environment),
        "</html>",
    ]
    return "\n".join(parts)
