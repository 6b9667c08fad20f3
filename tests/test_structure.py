"""The rules that hold the code together: imports point down, every op has all its parts, nothing grows without
limit.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "astrobiogen"

# A file may import ours only from its own group and from those named here (imports point down).
ALLOWED: dict[str, frozenset[str]] = {
    "kernels": frozenset({"extension"}),  # which is below: it only loads what was compiled
    "system": frozenset(),
    "data": frozenset({"system"}),
    "datatools": frozenset({"data", "system"}),
    "predict": frozenset({"kernels", "data", "datatools", "system", "training"}),
    "__main__": frozenset({"data", "datatools", "predict", "system", "testing", "training", "validate", ""}),
    "extension": frozenset({"_C"}),
    "ops": frozenset({"kernels"}),
    "testing": frozenset({"kernels", "ops"}),
    "layers": frozenset({"kernels", "ops"}),
    "integrations": frozenset({"kernels", "ops", "layers"}),
    "models": frozenset({"kernels", "ops", "layers"}),
    "training": frozenset({"kernels", "ops", "layers", "models", "data", "system", "integrations", "extension", ""}),
    "validate": frozenset({"kernels", "ops", "layers", "models", "data", "training", "testing"}),
    "doctor": frozenset(
        {
            "kernels",
            "ops",
            "layers",
            "models",
            "data",
            "system",
            "training",
            "integrations",
            "testing",
            "extension",
            "",
        }
    ),
    "evaluate": frozenset(
        {"kernels", "ops", "layers", "models", "data", "system", "training", "doctor", "extension", ""}
    ),
    "train": frozenset(
        {"kernels", "ops", "layers", "models", "data", "system", "training", "doctor", "evaluate", "extension", ""}
    ),
    "": frozenset({"kernels", "ops", "layers", "models", "integrations", "extension", "data", "predict", ""}),
}
# The rooms and files of the trainer, from the bottom up: each may import from those before it, and from itself.
TRAINING_ORDER = (
    "errors", "launch", "types", "config", "observe", "monitor", "distributed", "context", "batches", "optim",
    "update", "evaluation", "checkpoint", "tools", "trainer", "run",
)  # fmt: skip
MAX_FOLDER_FILES = 15
# Above the kernels nobody picks an implementation: that is the dispatcher's choice.
IMPLEMENTATIONS = ("reference", "triton_kernels")

# Files with an import that cannot stand at the top, with the reason.
CONDITIONAL_IMPORTS: dict[str, str] = {
    "astrobiogen/extension.py": "the compiled extension is optional, and torch's libraries must be loaded before it",
}

# Ops that lack a part, with the reason; empty when every op is complete.
_CUBLAS = "narrow fp32 layers on the CPU; a GPU's products are cuBLAS's, and nothing reaches a Triton kernel"
REFERENCE_ONLY: dict[str, str] = {"linear": _CUBLAS, "swiglu_mlp": _CUBLAS}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
# "path" or "path:function" -> why it may be longer.
LONGER: dict[str, str] = {}

# Words that leave a reader without an answer, or that belong to the making of the code and not to the code.
BANNED = (
    r"TODO", r"FIXME", r"XXX\b", r"HACK\b", r"NotImplementedError", r"except:\s*$", r"type: ignore(?!\[)", r"noqa(?!:)",
    r"/work/(?:main|shared)", r"/tmp/team",
)  # fmt: skip
# Names that two processes, or a user and we, would share; `astrobiogen.system.staging` makes others.
SHARED_NAMES = (
    r"gettempdir", r"tempfile\.mktemp\b", r"tmp-\{os\.getpid", r"""with_suffix\(["']\.(?:part|tmp|old|bak)""",
    r"""["'][\w.-]*\.(?:part|tmp|old|bak)["']""",
)  # fmt: skip
# Files that delete folders with all that is in them -> how they know that it is theirs.
DELETES: dict[str, str] = {
    "astrobiogen/system/staging.py": "a marker file that it holds locked",
    "astrobiogen/training/checkpoint/store.py": "names that only it gives, in a folder whose lock the run holds",
    "astrobiogen/datatools/make_climate/driver.py": "its own work folder, under its lock",
}
# Files that must name a banned word to forbid it.
BANNED_EXEMPT = ("tests/test_structure.py",)

# From the design: what users and tests rely on.
PUBLIC_NAMES: dict[str, tuple[str, ...]] = {
    "astrobiogen": ("ops", "use_kernels", "kernel_status", "swap_layers"),
    "astrobiogen.ops": ("rms_norm", "add_rms_norm"),
}


def python_files(folder: Path) -> list[Path]:
    """Source files below `folder`."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def relative(path: Path) -> str:
    """Path from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def group_of(module: str) -> str:
    """First component below the package, "" for the package itself."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def op_packages() -> list[str]:
    """Ops: the packages under `kernels` whose name has no underscore in front."""
    folders = (PACKAGE / "kernels").iterdir()
    return sorted(p.name for p in folders if (p / "__init__.py").exists() and not p.name.startswith("_"))


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(node, dotted name) of every import of ours; `from a import b` gives a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                path = ROOT / Path(*inner.split("."))
                yield node, inner if path.is_dir() or path.with_suffix(".py").exists() else str(node.module)


def at_the_top(tree: ast.Module) -> set[ast.AST]:
    """Statements at the top level of a file, and those of a top-level `if TYPE_CHECKING:`, which load nothing."""
    typing = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {*tree.body, *(inner for node in typing for inner in node.body)}


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_imports_point_down_and_stand_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    group = group_of(module_of(path))
    top = at_the_top(tree)
    for node, name in imported(tree):
        late = node not in top and relative(path) not in CONDITIONAL_IMPORTS
        assert not late, f"{relative(path)}:{node.lineno}: import of {name} is not at the top of the file"
        if name.split(".")[0] != "astrobiogen":
            continue
        other = group_of(name)
        assert other == group or other in ALLOWED[group], (
            f"{relative(path)}:{node.lineno}: {group or 'the package'} may not import {name}"
        )
        if other == "kernels" and group not in ("kernels", "testing", "doctor"):
            picked = name.rsplit(".", 1)[-1] in IMPLEMENTATIONS
            assert not picked, (
                f"{relative(path)}:{node.lineno}: {name} is an implementation; call it through astrobiogen.ops"
            )


def test_no_source_file_is_outside_the_groups() -> None:
    unknown = {group_of(module_of(path)) for path in python_files(PACKAGE)} - set(ALLOWED)
    assert not unknown, f"groups without an import rule: {sorted(unknown)}"


@pytest.mark.parametrize("path", python_files(PACKAGE / "training"), ids=relative)
def test_imports_within_the_trainer_point_down(path: Path) -> None:
    room = training_room(module_of(path))
    allowed = TRAINING_ORDER[: TRAINING_ORDER.index(room) + 1] if room else ()
    for node, name in imported(ast.parse(path.read_text())):
        if group_of(name) == "training":
            assert training_room(name) in allowed, f"{relative(path)}:{node.lineno}: {room} may not import {name}"


def training_room(module: str) -> str:
    """The room, or the file beside the rooms, of a module of the trainer; "" for the package itself."""
    parts = module.split(".")
    return parts[2] if len(parts) > 2 else ""


def full_folders(root: Path) -> dict[str, int]:
    """Folders below `root` with more files than one looks through, and how many they hold."""
    folders = {root, *(path for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__")}
    code = (".py", ".md", ".h", ".cpp")  # a data set may have as many files as it has items
    counts = {relative(f): sum(path.suffix in code for path in f.iterdir()) for f in sorted(folders)}
    return {name: count for name, count in counts.items() if count > MAX_FOLDER_FILES}


@pytest.mark.parametrize("root", [PACKAGE, ROOT / "csrc"], ids=relative)
def test_no_folder_is_too_full(root: Path) -> None:
    found = full_folders(root)
    assert not found, f"more than {MAX_FOLDER_FILES} files in a folder: {found}"


@pytest.mark.parametrize("op", op_packages())
def test_an_op_has_all_its_parts(op: str) -> None:
    folder = PACKAGE / "kernels" / op
    parts = [folder / f"{name}.py" for name in ("op", "reference", "triton_kernels", "samples")]
    parts += [folder / "README.md", ROOT / "csrc" / op / f"{op}.cpp"]
    parts += [ROOT / "tests" / "kernels" / f"test_{op}.py", ROOT / "benchmarks" / f"bench_{op}.py"]
    parts += [ROOT / "tests" / "compile_gate" / f"{op}.csv"]
    missing = [relative(path) for path in parts if not path.exists()]
    if op in REFERENCE_ONLY:
        assert missing, f"{op} is complete: take it out of REFERENCE_ONLY"
        return
    assert not missing, f"{op} lacks {missing}; finish it or list it in REFERENCE_ONLY with the reason"
    samples = importlib.import_module(f"astrobiogen.kernels.{op}.samples")
    assert samples.CASES, f"{op}: CASES is empty"
    assert samples.BENCHMARK_SIZES, f"{op}: BENCHMARK_SIZES is empty"
    assert any(case.gradcheck for case in samples.CASES), f"{op}: no case is marked gradcheck"
    names = [case.name for case in samples.CASES]
    assert len(set(names)) == len(names), f"{op}: two cases share a name"


def test_unfinished_ops_exist() -> None:
    assert set(REFERENCE_ONLY) <= set(op_packages())
    assert all(REFERENCE_ONLY.values()), "an unfinished op needs a reason"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*/README.md")), ids=relative)
def test_paths_named_in_readmes_exist(path: Path) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|md|csv|sh))`", path.read_text()))
    bases = (ROOT, path.parent, PACKAGE, path.parent.parent)
    missing = [name for name in sorted(named) if not any((base / name).exists() for base in bases)]
    assert not missing, f"{relative(path)} names files that do not exist: {missing}"


def checked_files() -> list[Path]:
    """Python of the package, tests and benchmarks, and C++."""
    found = [path for folder in ("astrobiogen", "tests", "benchmarks") for path in python_files(ROOT / folder)]
    native = [path for pattern in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(pattern)]
    return found + sorted(native)


@pytest.mark.parametrize("path", checked_files(), ids=relative)
def test_sizes_and_banned_words(path: Path) -> None:
    text = path.read_text()
    name = relative(path)
    lines = text.splitlines()
    if name not in LONGER:
        assert len(lines) <= MAX_FILE_LINES, f"{name} has {len(lines)} lines, allowed {MAX_FILE_LINES}"
    if name not in BANNED_EXEMPT:
        for number, line in enumerate(lines, 1):
            for word in BANNED:
                assert not re.search(word, line), f"{name}:{number}: {word!r} in: {line.strip()[:100]}"
    if path.suffix == ".py":
        for function in functions(ast.parse(text)):
            limit = MAX_KERNEL_LINES if is_kernel(function) else MAX_FUNCTION_LINES
            length = code_lines(function)
            if f"{name}:{function.name}" not in LONGER:
                assert length <= limit, f"{name}:{function.lineno}: {function.name} has {length} lines, allowed {limit}"


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_nothing_temporary_has_a_name_that_another_may_use(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for word in SHARED_NAMES:
            assert not re.search(word, line), f"{relative(path)}:{number}: {line.strip()[:100]}; use system.staging"
        if "rmtree(" in line:
            assert relative(path) in DELETES, f"{relative(path)}:{number}: whose folder is deleted? See system.staging"


def test_deleting_files_are_needed() -> None:
    for name, how in DELETES.items():
        assert "rmtree(" in (ROOT / name).read_text(), f"{name} deletes no folder"
        assert how, f"{name}: say how it knows that the folder is its own"


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True for a `triton.jit` function."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted: documenting arguments must not cost."""
    assert function.end_lineno is not None
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        length -= first.end_lineno - first.lineno + 1
    return length


def test_size_exceptions_are_needed() -> None:
    for name, reason in LONGER.items():
        path, _, function = name.partition(":")
        assert reason, f"{name}: say why"
        assert (ROOT / path).exists(), f"{name}: no such file"
        if function:
            sizes = [code_lines(f) for f in functions(ast.parse((ROOT / path).read_text())) if f.name == function]
            assert sizes, f"{name}: no such function"
            assert max(sizes) > MAX_FUNCTION_LINES, f"{name}: within the limit now"
        else:
            assert len((ROOT / path).read_text().splitlines()) > MAX_FILE_LINES, f"{name}: within the limit now"


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names_exist_and_are_documented(module: str) -> None:
    found = importlib.import_module(module)
    for name in PUBLIC_NAMES[module]:
        assert hasattr(found, name), f"{module}.{name} is missing"
        assert getattr(found, name).__doc__, f"{module}.{name} has no docstring"


def test_every_public_op_is_in_the_catalogue_with_docstring_and_a_registered_kernel() -> None:
    ops = importlib.import_module("astrobiogen.ops")
    registry = importlib.import_module("astrobiogen.kernels.registry")
    public = {name for name, value in vars(ops).items() if callable(value) and not name.startswith("_")}
    assert public, "astrobiogen.ops is empty"
    for name in sorted(public):
        assert getattr(ops, name).__module__.startswith("astrobiogen.kernels."), (
            f"ops.{name} is no re-export of a kernel"
        )
        assert getattr(ops, name).__doc__, f"ops.{name} has no docstring"
    assert registry.ops(), "no op is registered"


# Calls that trust what someone else has made, and what to call instead.
UNBOUNDED: dict[str, str] = {
    r"\b(?:gzip|lzma|bz2)\.(?:open|decompress)\(|\bzlib\.decompress\(": "data.guarded.gunzip or unxz: bounded",
    r"\bElementTree\.(?:parse|iterparse)\(|\bminidom\b": "data.guarded.xml_problem, then ElementTree.fromstring",
    r"\burlopen\(|\burlretrieve\(": "datatools.fetch.download.Web, which insists on https",
    r"\btorch\.load\(|\bimport pickle\b": "safetensors and JSON, which run nothing",
    r"\bsave_file\(": "training.checkpoint.tensor_files.write, which keeps the umask and lets training go on",
}


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_files_from_elsewhere_are_read_within_bounds(path: Path) -> None:
    text = path.read_text()
    for pattern, instead in UNBOUNDED.items():
        found = re.search(pattern, text)
        assert found is None, f"{relative(path)}: {found and found[0]!r}; use {instead}"
    assert "ElementTree.fromstring" not in text or "xml_problem(" in text, (
        f"{relative(path)}: XML that was not looked at"
    )


def test_the_structure_tests_find_planted_faults(tmp_path: Path) -> None:
    late = ast.parse("def f():\n    import torch\n")
    assert [node in set(late.body) for node, _ in imported(late)] == [False]
    with pytest.raises(AssertionError, match="relative import"):
        list(imported(ast.parse("from . import reference")))
    long = tmp_path / "long.py"
    long.write_text("def f():\n" + '    """Doc."""\n' + "    x = 1\n" * 61)
    assert code_lines(functions(ast.parse(long.read_text()))[0]) == 62
    planted = ('x.with_suffix(".part")', 'path.name + ".old"', 'f"{name}.tmp-{os.getpid()}"', 'p / "history.json.part"')
    assert all(any(re.search(word, line) for word in SHARED_NAMES) for line in planted)
    assert any(re.search(word, "    raise NotImplementedError") for word in BANNED)
    assert any(re.search(word, "x = 1  # type: ignore") for word in BANNED)
    for call in ("gzip.decompress(x)", "lzma.open(p)", "ElementTree.parse(p)", "request.urlopen(u)", "torch.load(p)"):
        assert any(re.search(pattern, call) for pattern in UNBOUNDED), call
    assert not any(re.search(word, "x = 1  # type: ignore[arg-type]") for word in BANNED)
