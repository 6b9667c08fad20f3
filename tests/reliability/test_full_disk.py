"""A disk that is full for a while costs the saves of that while, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_full_disk_costs_no_checkpoint_and_no_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.full_disk"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["newest_whole_while_full"] == ["step-00000006"]
    assert "checkpoint NOT saved" in done.stderr
    assert "the ones before it are untouched" in done.stderr
    assert "Traceback" not in done.stderr
