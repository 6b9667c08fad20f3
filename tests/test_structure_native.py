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
MAX_COLUMNS = 120
MAX_FUNCTION_LINES = 60
# What stands in one place: a pattern of code -> the only folder or file that may hold it.
ONE_PLACE = {
    r"_mm_sfence|movntdq|_mm_stream|nontemporal": "csrc/common/stream.h",
    r"std::atomic<int64_t> \w+\{0\}": "csrc/common/tasks.h",
    r"typedef float \w+ __attribute__\(\(vector_size": "csrc/common/simd.h",
    r"operator\(\)<c10::BFloat16>": "csrc/common/dtypes.h",
    r"findSchemaOrThrow": "csrc/common/autograd.h",
    r"0x1\.715476p0f \+ k?Round|-3\.33333164e-1f": "csrc/common/math.h",
    r"\[r\]\[v\] \+= |acc\[m\]\[v\] \+= \w+\[v\] \* ": "csrc/gemm/microkernel.h",
}
# Heads of a block that is no function.
NO_FUNCTION = re.compile(
    r"if|for|while|switch|else|do\b|return|case|struct|class|namespace|enum|union|extern|TORCH_|PYBIND|const auto"
    r"|auto \w+ =|static const|typedef|\}|#"
)


def native_files() -> list[Path]:
    """Sources and headers."""
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in (".cpp", ".h"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def upward_includes(text: str, folder: str) -> list[str]:
    """Own headers that a file in csrc/<folder>/ may not include; named from csrc/, whichever file includes them."""
    allowed = {folder, *(() if folder == "common" else ("common",)), *(SHARED if folder not in SHARED else ())}
    return [name for name in re.findall(r'#include "([^"]+)"', text) if name.split("/")[0] not in allowed]


def function_lengths(text: str) -> dict[str, int]:
    """Functions of a file that clang-format has laid out -> lines from their head to their closing brace."""
    lines = text.splitlines()
    found: dict[str, int] = {}
    for number, line in enumerate(lines):
        if not line.endswith("{"):
            continue
        start, head = number, line
        while head.count(")") > head.count("("):
            start -= 1
            head = f"{lines[start]} {head}"
        indent = len(lines[start]) - len(lines[start].lstrip())
        head = " ".join(head.split())
        if "(" not in head or "](" in head or NO_FUNCTION.match(head):
            continue
        closing = " " * indent + "}"
        end = next((at for at in range(number, len(lines)) if lines[at].startswith(closing)), len(lines))
        name = re.search(r"([\w~:]+)\(", head)
        found[f"{name[1] if name else head}:{start + 1}"] = end - start + 1
    return found


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    long_lines = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS]
    assert long_lines == [], f"{relative(path)}: lines over {MAX_COLUMNS} columns; run clang-format"
    assert {name: length for name, length in function_lengths(text).items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_no_assembly(path: Path) -> None:
    """The compiler schedules; an instruction of a level comes from a vector type or a builtin."""
    assert re.search(r"\b(?:__)?asm(?:__)?\b", path.read_text()) is None


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_what_all_kernels_need_stands_in_one_place(pattern: str) -> None:
    holders = {relative(path) for path in native_files() if re.search(pattern, path.read_text())}
    assert holders == {ONE_PLACE[pattern]}


def test_the_length_rule_finds_what_it_looks_for() -> None:
    text = (
        "template <int N>\nvoid f(int a,\n       int b) {\n  if (a) {\n    b();\n  }\n}\n\n"
        "struct S {\n  int a() {\n    return 1;\n  }\n};\n"
    )
    assert function_lengths(text) == {"f:2": 6, "a:10": 3}


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
