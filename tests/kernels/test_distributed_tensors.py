"""The ops on distributed tensors: two processes give what one gives, with the placements that need no exchange.

One pair of processes runs all of `distributed_tensor_cases.py`; the tests look at what it has left.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("distributed_tensor_cases.py")
_spec = importlib.util.spec_from_file_location("distributed_tensor_cases", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

# Sums over parts run in another order: fp32 roundings, relative to the largest value of a tensor.
LIMIT = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two processes have left."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)], env=common | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert (folder / "results.json").exists(), outputs[0] + outputs[1]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", script.cases())
def test_two_processes_give_what_one_gives(pair: dict[str, Any], name: str) -> None:
    found = pair["ops"][name]
    assert found["places"] == found["expected"]
    assert found["error"] < LIMIT


@pytest.mark.parametrize("way", ["tensor_parallel", "fully_sharded"])
def test_a_model_of_our_layers_trains_alike(pair: dict[str, Any], way: str) -> None:
    assert len(pair[way]) == 1 + 2 * 9 + 2
    worst = max(pair[way], key=pair[way].get)
    assert pair[way][worst] < LIMIT, worst


def test_the_first_distributed_tensor_may_come_compiled(pair: dict[str, Any]) -> None:
    assert pair["compiled"] < LIMIT


def test_an_op_without_a_rule_names_itself_and_the_way_out(pair: dict[str, Any]) -> None:
    for name, said in pair["refusals"].items():
        assert said.startswith(f"astrobiogen::{name} has no rule for distributed tensors"), said
        assert "to_local" in said


def test_nothing_distributed_is_imported_without_need() -> None:
    code = (
        "import sys, torch; from astrobiogen import ops; ops.rms_norm(torch.ones(2, 4), torch.ones(4)); "
        "print({'torch.distributed.tensor', 'astrobiogen.kernels.sharding'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=300, text=True, capture_output=True)
    assert done.stdout.strip() == "set()"
