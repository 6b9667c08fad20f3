"""No kernel is compiled anew for a length or a batch size: training on sequences of any length compiles once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("specialisation_counts.py")
# The pack kernel serves keys (turned), values and gradients (not turned), each made finite or not: no matter of sizes.
# A layer norm and a group norm are two epilogues of a convolution.
ROLES = {"attention: pack_kernel": 4, "conv_nd_norm: conv_taps": 4}
# Whether 16 divides the lengths and the strides of batches is compiled in: without it the widest heads spill.
ROLES |= {"attention: forward_kernel": 4, "attention: grad_query_kernel": 4, "attention: grad_key_kernel": 4}
ROLES |= {"decode: forward_kernel": 3}
MOST = 2


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    """Kernel -> specialisations over 200 batch sizes and lengths."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, cwd=SCRIPT.parents[2], text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sizes_are_not_compiled_in(counts: dict[str, int]) -> None:
    assert len(counts) >= 25
    assert not {kernel: count for kernel, count in counts.items() if count > ROLES.get(kernel, MOST)}
