"""What a prediction says, and how it is written."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from astrobiogen.system import staging

WITHIN, OUTSIDE, UNKNOWN, REFUSED = "within", "outside", "unknown", "refused"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One climate with one network.

    Attributes:
        climate, network: files.
        probability: of class 1, a habitat for the organism; NaN where a file was refused, as all numbers are then.
        share: predicted share of habitable surface and time, 0 to 1; NaN also where the model was not trained for it.
        low, high: of the interval that `Predictions.interval` names.
        flag: "within" the training data, "outside" them, "unknown" (they were not found) or "refused".
        reason: what lies outside, or why a file was refused.
        history: files of the planet's earlier epochs that were read with the climate.
        parameters_distance, climate_distance, network_distance: from the nearest of the training data, see `domain`.
    """

    climate: str
    network: str
    probability: float = math.nan
    share: float = math.nan
    low: float = math.nan
    high: float = math.nan
    flag: str = REFUSED
    reason: str = ""
    history: str = ""
    parameters_distance: float = math.nan
    climate_distance: float = math.nan
    network_distance: float = math.nan


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers in the order of the question.

    Attributes:
        rows: one per pair, refused ones too.
        interval: what `low` and `high` are: a range over runs, or a calibration.
        refused: file -> why it could not be used.
    """

    rows: Sequence[Prediction]
    interval: str
    refused: Mapping[str, str]

    def counts(self) -> dict[str, int]:
        """How many rows have each flag that occurs."""
        flags = [row.flag for row in self.rows]
        return {flag: flags.count(flag) for flag in (WITHIN, OUTSIDE, UNKNOWN, REFUSED) if flag in flags}

    def write_csv(self, path: Path) -> None:
        """Write the rows to `path`, which appears, or is replaced, when the table is whole."""
        columns = [field.name for field in dataclasses.fields(Prediction)]
        with staging.staged(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns[:6], "interval", *columns[6:]])
            for row in self.rows:
                cells = [_cell(value) for value in dataclasses.astuple(row)]
                writer.writerow([*cells[:6], self.interval if cells[4] else "", *cells[6:]])


def _cell(value: float | str) -> str:
    """Text of a cell; empty for an unknown number."""
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
