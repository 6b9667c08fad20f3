"""Defects of the original system that are visible in the source: none of them here. docs/defects.md maps all forty to
tests; this file holds those that no other test covers, and checks the map.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from astrobiogen import layers, models

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "astrobiogen"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RUNNABLE = [*SOURCES, ROOT / "Makefile", ROOT / "setup.py", *sorted((ROOT / "notebooks").glob("*.ipynb"))]

MACHINE_PATH = re.compile(r"""["'`=]\s*(?:/workspace|/home/|/root/|/content/|/mnt/|/Users/|[A-Z]:\\\\)""")
# Key formats of AWS, OpenAI, GitHub, Hugging Face, Slack, private keys; and a long literal behind a telling name.
CREDENTIAL = re.compile(
    r"AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|hf_[A-Za-z0-9]{30,}|xox[bp]-[0-9A-Za-z-]{10,}"
    r"|BEGIN (?:RSA |EC |OPENSSH )?PRIVATE KEY"
    r"|(?i:api_?key|secret|password|token)[\"']?\s*[:=]\s*[\"'][A-Za-z0-9+/_-]{20,}[\"']"
)
INSTALL = re.compile(r"pip\s+install|[\"']pip[\"']|conda\s+install|ensurepip")


def relative(path: Path) -> str:
    """Path from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def named_tests() -> Iterator[tuple[int, str, str]]:
    """(number of the defect, file, function) of every test in docs/defects.md."""
    for line in (ROOT / "docs" / "defects.md").read_text().splitlines():
        row = re.match(r"\| (\d+) \|", line)
        if row:
            for file, function in re.findall(r"`([\w/]+\.py)::(\w+)`", line):
                yield int(row.group(1)), file, function


def test_every_named_test_exists() -> None:
    rows = list(named_tests())
    assert {number for number, _, _ in rows} == set(range(1, 41))
    for number, file, function in rows:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in found, f"defect {number}: {file} has no {function}"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything, or does nothing with what it caught."""
    if handler.type is None:
        return True
    return all(isinstance(step, ast.Pass | ast.Continue) for step in handler.body) and (
        isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    )


def makes_module(node: ast.AST, names: frozenset[str]) -> bool:
    """Whether an expression constructs an nn.Module: `nn.Linear(...)` or one of our own classes."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    if called in names:
        return True
    prefix, _, name = called.rpartition(".")
    member = getattr(torch.nn, name, None)
    return prefix in ("nn", "torch.nn") and isinstance(member, type) and issubclass(member, torch.nn.Module)


def methods(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Methods that run when a model runs: all but constructors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (step for step in node.body if isinstance(step, ast.FunctionDef) and step.name != "__init__")


def test_no_handler_swallows_an_error() -> None:
    for path in SOURCES:
        handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
        lines = [handler.lineno for handler in handlers if swallows(handler)]
        assert not lines, f"{relative(path)}: lines {lines}"


def test_no_module_is_made_outside_a_constructor() -> None:
    own = [value for module in (models, layers) for value in vars(module).values() if isinstance(value, type)]
    names = frozenset(value.__name__ for value in own if issubclass(value, torch.nn.Module))
    assert {"RMSNorm", "RebuiltGraphVAE"} <= names
    for path in sorted([*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "layers").glob("*.py")]):
        for method in methods(ast.parse(path.read_text())):
            lines = [node.lineno for node in ast.walk(method) if makes_module(node, names)]  # type: ignore[attr-defined]
            assert not lines, f"{relative(path)}: {method.name} makes a module in lines {lines}"


def test_no_path_of_one_machine() -> None:
    for path in RUNNABLE:
        found = [line.strip()[:100] for line in path.read_text().splitlines() if MACHINE_PATH.search(line)]
        assert not found, f"{relative(path)}: {found}"


def test_no_credential_is_tracked() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".cfg", ".txt", ".sh", ""):
            text = path.read_text(errors="replace") if path.is_file() and path != Path(__file__) else ""
            found = CREDENTIAL.search(text)
            assert found is None, f"{name} holds something like a credential: {found.group()[:12]}..."


def test_no_code_installs_packages() -> None:
    """Messages may tell the reader how to install; calls may not."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "run", "Popen", "call", "check_call", "check_output", "system",
            ):  # fmt: skip
                assert not INSTALL.search(ast.unparse(node)), f"{relative(path)}:{node.lineno} installs packages"


def test_a_warning_filter_names_what_it_hides() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called in ("filterwarnings", "simplefilter") and node.args:
                action = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                named = {keyword.arg for keyword in node.keywords} & {"message", "category"} or len(node.args) > 1
                assert action == "error" or named, f"{relative(path)}:{node.lineno}: {ast.unparse(node)}"


def test_every_model_file_serves_the_system() -> None:
    """Files that the system, its loss or its presets import, directly or through others."""
    folder = PACKAGE / "models"
    reached, waiting = set[str](), ["unified_system", "multimodal_loss", "presets"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        source = (folder / f"{name}.py").read_text()
        waiting += re.findall(r"^from astrobiogen\.models\.(\w+) import", source, flags=re.MULTILINE)
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == reached, f"not part of the system: {sorted(files - reached)}"


def test_the_scans_find_planted_defects() -> None:
    bare = ast.parse("try:\n    f()\nexcept:\n    x = 1\n")
    wide = ast.parse("try:\n    f()\nexcept Exception:\n    pass\n")
    narrow = ast.parse("try:\n    f()\nexcept KeyError:\n    pass\n")
    found = [
        [swallows(node) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        for tree in (bare, wide, narrow)
    ]
    assert found == [[True], [True], [False]]
    inside = ast.parse("class A:\n    def forward(self, x):\n        return nn.Linear(3, 3)(x) + RMSNorm(3)(x)\n")
    made = [
        node for method in methods(inside) for node in ast.walk(method) if makes_module(node, frozenset({"RMSNorm"}))
    ]
    assert len(made) == 2
    assert MACHINE_PATH.search("path = '/workspace/data'")
    assert CREDENTIAL.search("api_key: 'abcdefghij0123456789XY'")
    assert not CREDENTIAL.search("token = 'short'")
    assert INSTALL.search("subprocess.run([sys.executable, '-m', 'pip', 'install', 'x'])")
