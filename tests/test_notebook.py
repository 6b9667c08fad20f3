"""The notebook runs from its first cell to its last, and what it shows is true."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _no_window() -> None:
    mpl.use("Agg")


def code(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "clear the outputs: figures go stale in a repository"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_tour(capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = NOTEBOOKS
    names: dict[str, Any] = {}
    for number, cell in enumerate(code(path)):
        exec(compile(cell.replace("UPDATES = 20", "UPDATES = 8"), f"{path.name}, code cell {number}", "exec"), names)
    assert names["difference"] < 1e-5
    assert names["turned"]
    assert len(names["losses"]) == 8
    assert sum(names["losses"][-3:]) < sum(names["losses"][:3])
    assert capsys.readouterr().out.count("P(viable)") == 8
