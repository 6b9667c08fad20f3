"""`python -m benchmarks.memory_plan`: the memory that updates take against their plans, over many configurations.

Each configuration is trained for two updates in a process of its own, as `python -m astrobiogen.train` does, whose
memory_report.json says what was planned and what was measured. Writes benchmarks/results/memory_plan.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import device_name

RESULTS = Path(__file__).parent / "results" / "memory_plan.csv"
CHECKPOINTING = [
    f"--model.{part}_config.use_gradient_checkpointing=true" for part in ("cnn", "graph", "llm")
]  # fmt: skip
TINY = {
    "as it is": [],
    "bf16": ["--precision.dtype=bf16"],
    "fp16": ["--precision.dtype=fp16"],
    "micro-batches of 4, window of 4": ["--data.batch_size=4", "--data.accumulation=4"],
    "micro-batches of 8, window of 2, bf16": [
        "--data.batch_size=8", "--data.accumulation=2", "--precision.dtype=bf16"
    ],
    "micro-batches of 1": ["--data.batch_size=1"],
    "micro-batches of 32": ["--data.batch_size=32"],
    "8-bit optimizer": ["--optimizer.name=adamw8bit"],
    "no average": ["--optimizer.ema_decay=0"],
    "no shared climates": ["--data.block=0"],
    "no shared climates, bf16, checkpointing": ["--data.block=0", "--precision.dtype=bf16", *CHECKPOINTING],
    "checkpointing": CHECKPOINTING,
    "plain PyTorch": ["--runtime.kernels=reference"],
    "seed 1": ["--seed=1"],
    "seed 2, fp16, window of 2": ["--seed=2", "--precision.dtype=fp16", "--data.accumulation=2"],
}  # fmt: skip
SMALL = {
    "as it is": [],
    "micro-batches of 4": ["--data.batch_size=4"],
    "micro-batches of 2": ["--data.batch_size=2"],
    "micro-batches of 1, window of 16": ["--data.batch_size=1", "--data.accumulation=16"],
    "bf16": ["--precision.dtype=bf16"],
    "fp16": ["--precision.dtype=fp16"],
    "checkpointing": CHECKPOINTING,
    "checkpointing, bf16": [*CHECKPOINTING, "--precision.dtype=bf16"],
    "8-bit optimizer": ["--optimizer.name=adamw8bit"],
    "averaged weights": ["--optimizer.ema_decay=0.99"],
    "plain PyTorch, micro-batches of 4": ["--runtime.kernels=reference", "--data.batch_size=4"],
    "seed 1, micro-batches of 4, bf16": ["--seed=1", "--data.batch_size=4", "--precision.dtype=bf16"],
}  # fmt: skip
CONFIGURATIONS = [("tiny", *item) for item in TINY.items()] + [("small", *item) for item in SMALL.items()]


def measure(preset: str, options: list[str]) -> dict[str, float]:
    """Planned and measured MiB of one configuration."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        command = [sys.executable, "-m", "astrobiogen.train", "--preset", preset, "--output", str(run)]
        cut = ["--epochs=1", "--data.limit=64", "--evaluation.bootstrap=0"]
        process = subprocess.Popen([*command, *cut, *options], stderr=subprocess.PIPE, text=True)
        report = run / "memory_report.json"
        while process.poll() is None and not report.exists():
            time.sleep(0.1)
        process.kill()
        said = process.communicate()[1]
        if not report.exists():
            raise RuntimeError(f"{preset} {options}: {said[-500:]}")
        found = json.loads(report.read_text())
    planned, measured = (found[f"{kind}_bytes"]["total"] / 2**20 for kind in ("planned", "measured"))
    return {"planned_mib": round(planned, 1), "measured_mib": round(measured, 1), "ratio": round(measured / planned, 4)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    place = f"{device_name(torch.device('cpu'))}, torch {torch.__version__}"
    for number, (preset, name, settings) in enumerate(CONFIGURATIONS, 1):
        rows.append({"preset": preset, "configuration": name, **measure(preset, settings), "machine": place})
        sys.stderr.write(f"{number}/{len(CONFIGURATIONS)} {preset}, {name}: {rows[-1]['ratio']}\n")
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
