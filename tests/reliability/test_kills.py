"""A short form of `python -m tests.reliability.kill_while_training --kills 200`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("more", [(), ("--asynchronous",)], ids=["at once", "in the background"])
def test_nothing_is_lost_in_a_few_kills(more: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.kill_while_training", "--kills", "12", "--seed", "7", *more],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 12
    assert result["unrecoverable"] == 0
    assert result["most_micro_batches_lost"] <= (2 if more else 1)
    assert result["weights_equal_to_never_killed"]
    assert result["loss_log_equal_to_never_killed"]
