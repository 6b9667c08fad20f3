"""Markdown that reads well: prose is as wide as the code, and the README is short."""

from pathlib import Path

import pytest

from tests.test_structure import PACKAGE, ROOT, relative

MAX_LINE = 120
MAX_README_WORDS = 600
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(PACKAGE / "kernels").rglob("*.md")])
RECIPES = [ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "benchmarks").rglob("*.sh")]
# What cannot be wrapped: tables, code by indentation, HTML, pictures.
FREE = ("|", "<", "![")


def long_prose(text: str) -> list[int]:
    """Lines of prose that are longer than the code's."""
    parts = text.split("```")
    prose = ("\n" * part.count("\n") if number % 2 else part for number, part in enumerate(parts))
    lines = enumerate("".join(prose).splitlines(), 1)
    long = ((number, line) for number, line in lines if len(line) > MAX_LINE)
    return [number for number, line in long if not line.startswith("    ") and not line.lstrip().startswith(FREE)]


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_prose_is_as_wide_as_code(path: Path) -> None:
    assert not (found := long_prose(path.read_text())), f"{relative(path)}: lines {found} pass {MAX_LINE} columns"


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_are_as_wide_as_code(path: Path) -> None:
    found = [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > MAX_LINE]
    assert not found, f"{relative(path)}: lines {found} pass {MAX_LINE} columns"


def test_the_rule_finds_planted_faults() -> None:
    long = "word " * 30
    assert long_prose(f"short\n{long}\n```\n{long}\n```\n| {long} |\n{long}") == [2, 7]


def test_the_readme_is_read_to_its_end() -> None:
    words = len((ROOT / "README.md").read_text().split())
    assert words <= MAX_README_WORDS, f"README.md has {words} words, allowed {MAX_README_WORDS}"
