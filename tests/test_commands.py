"""The commands of the package, and what an installation without kernels says."""

import importlib
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from astrobiogen import __main__ as commands
from astrobiogen import extension

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "astrobiogen", *arguments], capture_output=True, text=True, check=False
    )


def test_the_list_names_every_command() -> None:
    listed = run()
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout for name in commands.COMMANDS)
    wrong = run("trian")
    assert wrong.returncode == 2
    assert "no command 'trian'" in wrong.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_runs(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_every_script_is_a_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"astrobiogen", *(f"astrobiogen-{name}" for name in commands.COMMANDS)}
    for place in scripts.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_extension_that_does_not_load_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was built against another PyTorch: an undefined symbol."""
    (tmp_path / "broken_extension.py").write_text("raise ImportError('undefined symbol: _ZN3c105ErrorC2E')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="does not load with torch .* build it again; CPU operators run plain"):
        level, facts, problem = extension.load("broken_extension")
    assert (level, facts) == (None, None)
    assert "undefined symbol" in problem


def test_why_there_is_no_extension_is_what_the_build_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "REASON_FILE", tmp_path / "extension_missing.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "install PyTorch and a C++20 compiler" in extension.load("no_such_extension")[2]
        (tmp_path / "extension_missing.txt").write_text("PyTorch was not there\n")
        assert extension.load("no_such_extension")[2].endswith("was not built: PyTorch was not there")


def test_a_build_that_does_not_see_pytorch_says_so_in_the_package(tmp_path: Path) -> None:
    """As `pip install .` builds, in an environment of its own."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(hidden)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "was not built: PyTorch was not there" in made.stderr
    assert "no-build-isolation" in (tmp_path / "lib/astrobiogen/extension_missing.txt").read_text()


def test_the_start_script_passes_the_folders_of_the_environment(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    script = tmp_path / "container" / "start"
    script.parent.mkdir()
    script.write_text((ROOT / "container/start").read_text())
    script.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def started(*arguments: str, **given: str) -> str:
        return subprocess.run(
            [script, *arguments], env=path | given, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert started(ASTROBIOGEN_GPUS="1") == "-m astrobiogen.train"
    both = started("--smoke", ASTROBIOGEN_GPUS="2", ASTROBIOGEN_DATA="/d", ASTROBIOGEN_RUNS="/r")
    assert both.startswith(
        "-m torch.distributed.run --standalone --nproc-per-node 2 -m astrobiogen.train --data.path /d"
    )
    assert " --output /r/" in both
    assert both.endswith("--smoke")
    assert "--output /r" not in started("--resume", "x", ASTROBIOGEN_GPUS="1", ASTROBIOGEN_RUNS="/r")
