"""The compiled kernels of each instruction-set level hold no instruction above it: one binary serves every machine."""

import platform
import re
import shutil
import subprocess
from collections import defaultdict

import pytest

extension = pytest.importorskip("astrobiogen._C", reason="the C++ extension is not built")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)"),
]
LEVELS = ("baseline", "avx2", "avx512")
# What no instruction of a level may name: AVX-512's registers, masks and the upper half of the register file; and
# below AVX the vex-encoded instructions, all of which begin with v.
ABOVE = {
    "baseline": re.compile(r"\tv[a-z0-9]+ |%[yz]mm|%k[1-7]"),
    "avx2": re.compile(r"%zmm|%k[1-7]|%[xy]mm(?:1[6-9]|2\d|3[01])"),
    "avx512": re.compile(r"(?!)"),
}
USES = {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}
SYMBOL = re.compile(r"^[0-9a-f]+ <(\S+)>:$")


def level_of(symbol: str) -> str:
    """The level that a function is compiled for, which its name ends in (`run_avx2`, `forward_avx512`)."""
    found = re.search(r"(?:run|forward|backward)_(avx2|avx512)", symbol)
    return found[1] if found else "baseline"


def functions(disassembly: str) -> dict[str, dict[str, list[str]]]:
    """level -> function -> its instructions."""
    found: dict[str, dict[str, list[str]]] = {level: defaultdict(list) for level in LEVELS}
    current: list[str] = []
    for line in disassembly.splitlines():
        if head := SYMBOL.match(line):
            current = found[level_of(head[1])][head[1]]
        elif "\t" in line:
            current.append(line)
    return found


def violations(found: dict[str, dict[str, list[str]]], level: str) -> list[str]:
    """Functions of a level with an instruction above it."""
    return [
        f"{name}: {line.strip()}"
        for name, lines in found[level].items()
        for line in [next((line for line in lines if ABOVE[level].search(line)), None)]
        if line is not None
    ]


@pytest.fixture(scope="module")
def disassembly() -> dict[str, dict[str, list[str]]]:
    command = ["objdump", "-d", "--no-show-raw-insn", "--section=.text", extension.__file__]
    return functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("level", LEVELS)
def test_no_instruction_is_above_its_level(disassembly: dict[str, dict[str, list[str]]], level: str) -> None:
    entries = [name for name in disassembly[level] if "astrobiogen" in name]
    assert len(entries) > 20, f"{level}: {len(entries)} functions; was the extension stripped?"
    assert any(USES[level] in line for lines in disassembly[level].values() for line in lines)
    assert violations(disassembly, level) == []


def test_the_search_finds_what_it_looks_for() -> None:
    planted = functions(
        "0000 <f>:\n 1:\tvaddps %ymm1,%ymm0,%ymm0\n"
        "0008 <_Z8run_avx2v>:\n 9:\tvaddps %zmm1,%zmm0,%zmm0\n"
        "0010 <_Z4goodv>:\n 11:\taddps  %xmm1,%xmm0\n"
    )
    assert len(violations(planted, "baseline")) == len(violations(planted, "avx2")) == 1
