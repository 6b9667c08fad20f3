"""A short form of the kill experiment; `kill_while_training.py --kills 200` is the long one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost_in_a_few_kills() -> None:
    script = Path(__file__).with_name("kill_while_training.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "12", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 12
    assert result["lost_or_unreadable"] == 0
    assert result["equal_to_never_killed"]
