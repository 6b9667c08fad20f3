"""The rules that hold the C++ together: a folder per operator, includes that stay inside it or point down."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "csrc"
# What every operator's folder may include: what all share, and the matrix products.
SHARED = ("common", "gemm")
MAX_FILES = 15


def native_files() -> list[Path]:
    """Sources and headers."""
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cpp", ".h"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def upward_includes(text: str, folder: str) -> list[str]:
    """Own headers that a file in csrc/<folder>/ may not include; named from csrc/, whichever file includes them."""
    allowed = {folder, *(() if folder == "common" else ("common",)), *(SHARED if folder not in SHARED else ())}
    return [name for name in re.findall(r'#include "([^"]+)"', text) if name.split("/")[0] not in allowed]


def test_a_folder_per_operator() -> None:
    operators = {path.parent.name for path in (ROOT / "astrobiogen" / "kernels").glob("*/op.py")}
    folders = {path.name for path in NATIVE.iterdir() if path.is_dir()}
    assert folders == operators | set(SHARED)


def test_no_folder_is_crowded() -> None:
    counts = Counter(relative(path.parent) for path in native_files())
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_includes_stay_in_the_folder_or_point_down(path: Path) -> None:
    folder = path.relative_to(NATIVE).parts[0]
    text = path.read_text()
    if path.parent == NATIVE:  # what joins the operators to a module
        folder = "common"
    assert upward_includes(text, folder) == []
    for name in re.findall(r'#include "([^"]+)"', text):
        assert (NATIVE / name).is_file(), f"{relative(path)} includes {name}, which does not exist"


def test_the_include_rule_finds_what_it_looks_for() -> None:
    assert upward_includes('#include "rope/rope.h"', "linear") == ["rope/rope.h"]
    assert upward_includes('#include "checks.h"', "linear") == ["checks.h"]
    assert upward_includes('#include "gemm/blocks.h"', "common") == ["gemm/blocks.h"]
    assert upward_includes('#include "gemm/blocks.h"\n#include "common/simd.h"\n#include <vector>', "linear") == []


def test_an_sdist_holds_every_native_file() -> None:
    """Headers are no sources of the extension: without the line a build from an sdist has none."""
    assert "recursive-include csrc *.cpp *.h" in (ROOT / "MANIFEST.in").read_text().splitlines()
