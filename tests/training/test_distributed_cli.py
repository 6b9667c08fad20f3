"""`torchrun -m astrobiogen.train` on the bundled data, and what one process makes of the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from astrobiogen import evaluate
from astrobiogen.training import checkpoint
from astrobiogen.training.config import preset

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "astrobiogen.train")
SHORT = (
    "--smoke", "--epochs=1", "--data.limit=16", "--evaluation.baselines=false", "--evaluation.ablation_limit=4",
    "--evaluation.bootstrap=0", "--optimizer.name=adamw8bit",
)  # fmt: skip


def torchrun(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, *options]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, check=False)


def test_two_processes_train_a_sharded_model_that_one_can_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    done = torchrun(*SHORT, "--distributed.strategy=fsdp2", f"--output={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, fsdp2: they share the 8 samples of each update" in done.stderr
    assert done.stdout.count("Test set (tiny, seed 0)") == 1
    assert (folder / "process-1" / "train.log").exists()
    facts = json.loads((folder / "environment.json").read_text())["runtime"]
    assert (facts["processes"], facts["strategy"]) == (2, "fsdp2")
    content = checkpoint.read(checkpoint.CheckpointStore(folder / "checkpoints", keep=2).candidates()[0])
    moments = content.documents["process-1"]["moments"]
    assert moments
    assert any(value.dtype == torch.uint8 for value in content.tensors["process-1"].values())
    capsys.readouterr()
    assert evaluate.main([str(folder), f"--output={tmp_path / 'again'}"]) == 0
    before = json.loads((folder / "metrics.json").read_text())
    after = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert after["total_loss"] == pytest.approx(before["total_loss"], rel=1e-5)
    assert before["ablation"].keys() == after["ablation"].keys()
    assert after["model"]["all"]["accuracy"] == before["model"]["all"]["accuracy"]


def test_errors_are_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = torchrun("--smoke", f"--output={tmp_path}")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2
    assert sum("process 0 of 2 failed" in line for line in lines) == 1
    assert all("exists and is not an empty folder" in line for line in lines)


def test_two_cards_preset_shards() -> None:
    assert preset("a5000x2").distributed.strategy == "fsdp2"
    assert preset("a5000").distributed.strategy == "ddp"
