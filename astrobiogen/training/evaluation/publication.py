"""metrics.json, report.html and the closing table."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from astrobiogen import data
from astrobiogen.training.config import run_folder
from astrobiogen.training.evaluation import comparison, metrics, passes, report
from astrobiogen.training.observe.monitor import read_log

_PLAIN_WIDTH = 150


def publish(folder: Path, result: dict[str, Any], predictions: Mapping[str, metrics.Predictions]) -> None:
    """Write metrics.json and report.html."""
    run_folder.write_json(folder / run_folder.METRICS, result)
    log = folder / "log.jsonl"
    records = read_log(log).thinned(report.MOST_RECORDS)
    facts, used = (run_folder.read_json(folder / name) for name in (run_folder.ENVIRONMENT, run_folder.MEMORY))
    page = report.render(result, records, predictions, memory=used, environment=facts)
    run_folder.write_text(folder / run_folder.REPORT, page)


def write_predictions(path: Path, samples: data.HabitatDataset, found: passes.Evaluation) -> None:
    """Write what the model said of each of `samples` as CSV: climate, organism, cell, class and P(class 1), true and
    predicted share of habitable surface and time.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("climate", "organism", "cell", "label", "probability", "fraction", "predicted_fraction"))
    for pair, probability, fraction in zip(samples.pairs, found.predictions.probability, found.fraction, strict=True):
        numbers = (f"{value:.6g}" for value in (probability, pair.fraction, fraction))
        writer.writerow((pair.climate, pair.organism, pair.cell, pair.label, *numbers))
    run_folder.write_text(path, text.getvalue())


def _readings(differences: Mapping[str, Any]) -> str:
    words = {"accuracy": "accuracy", "auroc": "AUROC", "loss": "cross-entropy"}
    return ", ".join(f"{words[name]} {_signed(item)}" for name, item in differences.items())


def _signed(item: dict[str, Any]) -> str:
    """A paired difference with its interval and verdict."""
    if None in (item["value"], item["low"], item["high"]):
        return "undefined"
    verdict = "better" if item["better"] else "worse" if item["worse"] else "no difference shown"
    return f"{item['value']:+.3f} [{item['low']:+.3f}, {item['high']:+.3f}] ({verdict})"


def show(result: dict[str, Any], folder: Path | None) -> None:
    """Print the closing table on stdout, and where the rest is (`folder`), if it was written."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_PLAIN_WIDTH)
    table = rich.table.Table(
        *report.TABLE_HEAD, title=f"Test set ({result['preset']}, seed {result['seed']})", box=rich.box.ASCII
    )
    for row in report.figures_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(comparison.INTERVAL_METHOD, style="dim")
    if "ablation" in result:
        readings = ", ".join(f"{name}: {report.verdict(item)}" for name, item in result["ablation"].items())
        console.print(f"Masking a modality at evaluation, by cross-entropy: {readings}")
    if "against_majority_class" in result:
        console.print(f"Model minus majority class, paired: {_readings(result['against_majority_class'])}")
    if best := result.get("against_best_baseline"):
        readings = _readings(best["difference"])
        console.print(f"Model minus the best baseline on these data, {best['baseline']}, paired: {readings}")
    if found := result.get("against_additive_new_planet"):
        console.print(f"Model minus planet + organism effects on new planets, paired: {_readings(found)}")
    if reason := result["run"]["weights"].get("reason"):
        taken = result["run"]["weights"]
        console.print(f"Not the best model ({reason}): figures of {taken['checkpoint']}, epoch {taken['epoch']}")
    if folder is not None:
        console.print(f"Full figures: {folder / run_folder.METRICS}; plots: {folder / run_folder.REPORT}")
