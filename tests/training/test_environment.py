"""What a run needs and leaves around it: optional packages, paths, open files, the record of its origin."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from astrobiogen.training.config import run_folder
from tests.training.conftest import toy_config

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "astrobiogen"


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        ("torch_geometric", "astrobiogen, astrobiogen.ops, astrobiogen.layers"),
        ("triton", "astrobiogen, astrobiogen.ops, astrobiogen.train, astrobiogen.evaluate"),
        ("bitsandbytes", "astrobiogen.train, astrobiogen.training.optim.optimizer"),
        ("transformers", "astrobiogen.train, astrobiogen.integrations"),
        ("pynvml", "astrobiogen.train, astrobiogen.training.observe.gpu"),
        ("wandb", "astrobiogen.train, astrobiogen.training.observe.trackers"),
    ],
)
def test_what_does_not_need_a_package_works_without_it(absent: str, modules: str) -> None:
    """Operators need neither PyG nor Triton; a training run needs none of the extras."""
    script = f"import sys; sys.modules[{absent!r}] = None; import {modules}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_path_of_a_machine_and_no_key_in_the_sources() -> None:
    paths = re.compile(r"""["'](/(home|root|work|mnt|data|users|workspace|opt)/|[A-Z]:\\\\)""", re.IGNORECASE)
    secrets = re.compile(r"""(api_key|token|password|secret)\s*=\s*["'][A-Za-z0-9]{12,}["']""", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if paths.search(line) or secrets.search(line)
    ]
    assert found == []
    assert paths.search('DATA = "/home/me/data"')
    assert secrets.search('api_key = "0123456789abcdef"')


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_run_closes_what_it_opened(make_run: object, tmp_path: Path) -> None:
    run = make_run(toy_config())  # type: ignore[operator]
    run.trainer.fit()
    run.monitor.__exit__(None, None, None)
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets.append(os.readlink(link))
        except OSError:  # the descriptor of the listing itself
            continue
    assert [target for target in targets if target.startswith(str(tmp_path))] == []


def test_the_origin_of_a_run_is_on_record() -> None:
    facts = run_folder.environment({"seed": 3, "threads": 1})
    assert facts["runtime"] == {"seed": 3, "threads": 1}
    assert {"torch", "numpy", "safetensors"} <= facts["libraries"].keys()
    assert facts["command"] == sys.argv
    assert {"started", "python", "system", "processor", "cpus", "kernels", "astrobiogen"} <= facts.keys()
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", facts["git"])
