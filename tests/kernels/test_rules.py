"""The rules that hold the operators together, read off their sources: who checks, who casts, who launches."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.test_structure import PACKAGE, ROOT, functions, python_files, relative


def test_integers_are_checked_in_one_place() -> None:
    """`isinstance(value, int)` refuses numpy's integers and takes bools: `checks.check_int` decides for every op."""
    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        if path.name != "checks.py":
            assert not (found := integer_checks(path)), f"{path.relative_to(ROOT)}:{found}: use check_int or check_ints"


def integer_checks(path: Path) -> list[int]:
    """Lines that ask whether something is an int."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    asking = [c for c in calls if getattr(c.func, "id", "") == "isinstance" and len(c.args) == 2]
    return [c.lineno for c in asking if any(getattr(n, "id", "") == "int" for n in ast.walk(c.args[1]))]


def native_functions(text: str) -> dict[str, str]:
    """C++ functions at the start of a line: name -> the code from its head to its closing brace."""
    heads = re.finditer(r"^(?=\S)(?:inline )?[\w:<>, ]+[\w>] (\w+)\([^;{}]*\) \{\n", text, re.MULTILINE)
    return {head[1]: text[head.start() : text.find("\n}\n", head.start())] for head in heads}


def unchecked_ops(text: str) -> list[str]:
    """Ops that a C++ file registers for the CPU by a function that does not begin with a check of its arguments.

    The formulas on AutogradCPU hand their arguments to the op of the same name, which checks them.
    """
    found = []
    for block in re.findall(r"TORCH_LIBRARY_IMPL\(astrobiogen, CPU, m\) \{.*?\}\n", text, re.DOTALL):
        for op, function in re.findall(r'm\.impl\("(\w+)", &[\w:]*?(\w+)\)', block):
            body = native_functions(text).get(function, "").partition("{\n")[2]
            first = " ".join(body.split("\n")[:2])
            if f'"astrobiogen::{op}"' not in first or "check::Op" not in first:
                found.append(op)
    return found


def test_every_registered_cpu_kernel_begins_with_a_check_of_its_arguments() -> None:
    registered = 0
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        text = path.read_text()
        registered += len(re.findall(r"m\.impl\(", text))
        assert not unchecked_ops(text), f"{relative(path)}: {unchecked_ops(text)} take their arguments on trust"
    assert registered > 20
    planted = (
        'Tensor f(const Tensor& x) {\n  return x;\n}\nTORCH_LIBRARY_IMPL(astrobiogen, CPU, m) { m.impl("f", &a::f); }\n'
    )
    assert unchecked_ops(planted) == ["f"]
    assert not unchecked_ops(planted.replace("return x", 'check::Op op("astrobiogen::f")'))


# Public functions of `astrobiogen.ops` that autocast does not concern.
WITHOUT_AUTOCAST: dict[str, str] = {
    "EdgeLists": "integers",
    "edge_lists": "integers",
    "rope_frequencies": "takes no tensor",
    "rope_frequencies_dynamic_ntk": "takes no tensor",
    "rope_frequencies_linear": "takes no tensor",
    "rope_frequencies_llama3": "takes no tensor",
    "rope_frequencies_yarn": "takes no tensor",
    "rope_gather": "copies rows, computes nothing",
    "rope_positions": "integers",
}
# PyTorch's questions about autocast; one module asks them.
AUTOCAST_QUESTIONS = r"is_autocast_enabled|get_autocast|is_any_autocast|is_autocast_available"
ASKS_ABOUT_AUTOCAST = ("astrobiogen/kernels/autocast.py",)


def uses_autocast_rule(source: str, function: str) -> bool:
    """Whether `function` of a module with `source` calls the module `autocast`."""
    body = next(
        node
        for node in functions(ast.parse(source))
        if node.name == function and "overload" not in {ast.unparse(decorator) for decorator in node.decorator_list}
    )
    return any(
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "autocast"
        for node in ast.walk(body)
    )


def test_every_public_op_has_an_autocast_rule() -> None:
    ops = importlib.import_module("astrobiogen.ops")
    public = {name: value for name, value in vars(ops).items() if callable(value) and not name.startswith("_")}
    assert set(WITHOUT_AUTOCAST) <= set(public)
    for name, value in public.items():
        source = Path(str(importlib.import_module(value.__module__).__file__)).read_text()
        if name not in WITHOUT_AUTOCAST:
            assert uses_autocast_rule(source, name), f"ops.{name} ignores autocast: call astrobiogen.kernels.autocast"
            assert "autocast" in str(value.__doc__).lower(), f"ops.{name}: its docstring must give the autocast rule"


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
def test_one_module_asks_about_autocast(path: Path) -> None:
    if relative(path) not in ASKS_ABOUT_AUTOCAST:
        found = re.findall(AUTOCAST_QUESTIONS, path.read_text())
        assert not found, f"{relative(path)} asks {found}: call astrobiogen.kernels.autocast"


def bare_launches(tree: ast.AST) -> list[int]:
    """Lines of calls ``kernel[grid](...)``."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript))
    return [call.lineno for call in calls]


@pytest.mark.parametrize("path", python_files(PACKAGE / "kernels"), ids=relative)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(path: Path) -> None:
    found = bare_launches(ast.parse(path.read_text()))
    allowed = 1 if relative(path) == "astrobiogen/kernels/triton_launch.py" else 0  # the helper itself
    assert len(found) == allowed, f"{relative(path)}:{found}: launch kernels by kernels.triton_launch.launch"


def test_the_rules_find_planted_faults(tmp_path: Path) -> None:
    asks = tmp_path / "asks.py"
    asks.write_text("isinstance(a, str)\nisinstance(b, (int, float))\nisinstance(c, int | None)\n")
    assert integer_checks(asks) == [2, 3]
    rule = "def f(x):\n    return autocast.widest(x=x)\ndef g(x):\n    return x\n"
    assert uses_autocast_rule(rule, "f")
    assert not uses_autocast_rule(rule, "g")
    assert bare_launches(ast.parse("def f(x):\n    k[(1,)](x)\n    launch(k, (1,))(x)\n")) == [2]
