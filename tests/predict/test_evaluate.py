"""`evaluate RUN --data PACK`: every pair of another data set, whatever part it is in."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import astrobiogen
from astrobiogen import data, evaluate


@pytest.mark.parametrize("cells", [("seen", "new_both"), ("train", "validation", "new_planet")])
def test_every_pair_of_a_pack_is_scored(runs: list[Path], tmp_path: Path, cells: tuple[str, ...]) -> None:
    pack, output = Path(shutil.copytree(data.SAMPLE_FOLDER, tmp_path / "pack")), tmp_path / "out"
    with (pack / "pairs.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        names, everything = list(reader.fieldnames or ()), list(reader)
    rows = [row for cell in cells for row in [r for r in everything if r["cell"] == cell][:2]]
    with (pack / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    manifest = json.loads((pack / "manifest.json").read_text())
    raw = (pack / "pairs.csv").read_bytes()
    manifest["files"]["pairs.csv"].update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))
    (pack / "manifest.json").write_text(json.dumps(manifest))
    options = ["--data", str(pack), "--no-ablation", "--bootstrap", "0", "--device", "cpu", "--output", str(output)]
    assert evaluate.main([str(runs[0]), *options]) == 0
    with (output / "predictions.csv").open(newline="") as file:
        scored = list(csv.DictReader(file))
    assert sorted((row["climate"], row["organism"], row["cell"], row["label"]) for row in scored) == sorted(
        (f"{row['planet']}_g{row['epoch']}", row["organism"], row["cell"], row["label"]) for row in rows
    )
    model, bundle = astrobiogen.load_model(runs[0], device="cpu"), data.load(pack)
    samples = [sample for part in (bundle.train, bundle.validation, bundle.test) for sample in part]
    with torch.inference_mode():
        expected = model(model.inputs(samples))["probability"].numpy()
    found = {(row["climate"], row["organism"]): float(row["probability"]) for row in scored}
    keys = [(sample.metadata["climate"], sample.metadata["organism"]) for sample in samples]
    np.testing.assert_allclose([found[key] for key in keys], expected, rtol=1e-4)
