"""What users see: the public names, what an import loads, and that no private name crosses a package's border."""

import ast
import importlib
import inspect
import itertools
import json
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from astrobiogen.layers import Conv4d, Conv5d, ConvNd

ROOT = Path(__file__).parents[1]
FACES = ("astrobiogen", "astrobiogen.ops", "astrobiogen.layers", "astrobiogen.models", "astrobiogen.data")
# Packages that an import of the library or of its layers must not load: each belongs to an extra.
HEAVY = (
    "jsonargparse", "libsbml", "matplotlib", "netCDF4", "pandas", "rich", "scipy", "sklearn", "tokenizers",
    "torch_geometric", "transformers", "xarray", "yaml", "zarr",
)  # fmt: skip


@pytest.mark.parametrize("name", FACES)
def test_public_names_are_those_of_all(name: str) -> None:
    module = importlib.import_module(name)
    listed = list(module.__all__)
    assert listed == sorted(set(listed), key=lambda n: (not n.isupper(), not n[0].isupper(), n)) or listed == sorted(
        set(listed)
    ), f"{name}.__all__ is not sorted"
    for public in listed:
        assert getattr(module, public) is not None, f"{name}.{public} does not exist"
    # A subpackage's modules become its attributes when they are imported; every other public attribute is a promise.
    found = {n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert found <= set(listed), f"{name} shows {sorted(found - set(listed))} besides its __all__"


def test_dir_of_the_package_shows_the_public_names_only() -> None:
    package = importlib.import_module("astrobiogen")
    assert {n for n in dir(package) if not n.startswith("__")} == set(package.__all__)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that `statement` loads in a fresh interpreter, those of torch alone not counted."""
    code = (
        "import sys, json, torch, numpy, packaging\nbefore = set(sys.modules)\n" + statement + "\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    ["import astrobiogen", "from astrobiogen import ops, layers", "import astrobiogen; astrobiogen.models.presets"],
)
def test_the_library_loads_nothing_but_torch_and_numpy(statement: str) -> None:
    loaded = loaded_by(statement)
    assert not loaded & set(HEAVY), f"{statement}: loads {sorted(loaded & set(HEAVY))}"
    third = loaded - set(sys.stdlib_module_names) - {"astrobiogen", "torch", "numpy"}
    known = importlib.import_module("importlib.metadata").packages_distributions()
    assert not third & set(known), f"{statement}: loads {sorted(third & set(known))}"


def test_the_help_of_train_loads_no_slow_package() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['train', '--help']\ntry:\n"
        "    runpy.run_module('astrobiogen.train', run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "slow = {'torch_geometric', 'sklearn', 'scipy', 'matplotlib', 'transformers', 'pandas', 'xarray'}\n"
        "sys.stderr.write('loaded: ' + str(sorted(slow & set(sys.modules))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--optimizer.learning_rate" in run.stdout
    assert run.stderr.endswith("loaded: []"), run.stderr


def test_torch_numpy_and_packaging_are_all_that_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {item.split(">")[0].split("[")[0] for item in project["dependencies"]}
    assert names == {"torch", "numpy", "packaging"}
    assert {"train", "data", "hf", "gpu", "bench"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("layer", [Conv4d, Conv5d])
def test_convolutions_show_their_arguments(layer: type) -> None:
    shown = inspect.signature(layer).parameters
    general = inspect.signature(ConvNd).parameters
    assert list(shown) == [name for name in general if name != "n_axes"]
    assert {name: p.default for name, p in shown.items()} == {
        name: p.default for name, p in general.items() if name != "n_axes"
    }


def private_imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of ours, in a file of `package`, that takes a private name of another."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or str(node.module).split(".")[0] not in ("astrobiogen", "benchmarks"):
            continue
        for alias in node.names:
            parts = f"{node.module}.{alias.name}".split(".")
            for place, part in enumerate(parts):
                holder = parts[:place] if (ROOT / Path(*parts[:place])).is_dir() else parts[: place - 1]
                if part.startswith("_") and not part.startswith("__") and ".".join(holder) != package:
                    yield node.lineno, ".".join(parts)


@pytest.mark.parametrize("folder", ["astrobiogen", "benchmarks", "examples"])
def test_no_private_name_is_imported_from_another_package(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        found = list(private_imports(ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).parent.parts)))
        assert not found, f"{path.relative_to(ROOT)}: {found}; make it public or move it"


def test_the_rule_on_private_names_finds_planted_faults() -> None:
    for line in ("from astrobiogen.kernels import _registry", "from astrobiogen.kernels.registry import _ENTRIES"):
        assert list(private_imports(ast.parse(line), "astrobiogen.kernels.rope")), line
        assert not list(private_imports(ast.parse(line), "astrobiogen.kernels")), line


NUMPY_STYLE = ("Parameters", "Returns", "Raises", "Attributes", "Yields", "Notes")


@pytest.mark.parametrize("folder", ["astrobiogen", "benchmarks", "examples"])
def test_docstrings_are_in_one_style(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = path.read_text().splitlines()
        for number, (line, under) in enumerate(itertools.pairwise(lines), 1):
            numpy = line.strip() in NUMPY_STYLE and under.strip() and set(under.strip()) == {"-"}
            assert not numpy, f"{path.relative_to(ROOT)}:{number}: section {line.strip()!r} in NumPy's style"
