"""The emulator of compiled kernels: it gives a GPU's values, finds each kind of planted fault, and our kernels pass.

Compiling and interpreting exclude each other in a process, so `emulated_kernels.py` and the battery's short form run in
processes of their own.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from astrobiogen.testing import emulate
from astrobiogen.testing.ptx.machine import numbers
from astrobiogen.testing.ptx.machine.program import parse

SCRIPT = Path(__file__).with_name("emulated_kernels.py")
ROOT = SCRIPT.parents[2]


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `emulated_kernels.py` has seen."""
    return json.loads(run(str(SCRIPT)))


def test_sound_kernels_are_right_and_nothing_is_found(seen: dict[str, Any]) -> None:
    # Roundings of sums of that many terms of size 1; one of the result.
    allowed = {
        "softmax sm_80": 1e-7, "softmax sm_86": 1e-7, "softmax sm_89": 1e-7, "layer norm": 2e-6, "atomic sum": 2e-5,
        "matmul float16": 64 * 2**-11, "matmul bfloat16": 64 * 2**-8, "matmul float32": 208 * 2**-10,
    }  # fmt: skip
    for name, limit in allowed.items():
        assert seen[name]["findings"] == [], name
        assert seen[name]["error"] < limit, name
        assert seen[name]["kernels"] == 1
        assert seen[name]["instructions"] > 50


FAULTS = {
    "no barrier in a reduction": "read after another warp's write without a barrier",
    "no second barrier in a reduction": "written after another warp's read without a barrier",
    "no barrier in a pipelined loop": "read after another warp's write without a barrier",
    "no wait for copies": "read while an asynchronous copy writes it, without a wait",
    "no mask at a store": "a store outside the tensors",
    "barrier of half a block": "barrier that only a part of a block's threads reaches",
    "blocks that overwrite each other's input": "a block overwrites bytes that another block reads",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(seen: dict[str, Any], fault: str) -> None:
    findings = seen[fault]["findings"]
    assert any(FAULTS[fault] in finding for finding in findings), findings
    assert all(".py:" in finding for finding in findings)  # each names a line


@pytest.mark.parametrize("fault", ["no barrier in a reduction", "no barrier in a pipelined loop"])
def test_a_missing_barrier_leaves_the_values_right(seen: dict[str, Any], fault: str) -> None:
    assert not math.isnan(seen[fault]["error"])
    assert seen[fault]["error"] < 64 * 2**-11


def test_what_is_not_emulated_is_refused(seen: dict[str, Any]) -> None:
    assert seen["an unknown instruction"]["unsupported"].startswith("nanosleep.u32 5 at ")


def test_the_kernels_pass_on_compiled_code() -> None:
    report = run("-m", "astrobiogen.testing.ptx.run", "--short")
    assert report.splitlines()[-1].endswith(" 0 failed"), report


def test_interpreted_kernels_are_refused() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("only without a GPU Triton's interpreter is on here")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        emulate(lambda: None)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of \(80, 86, 89\), got 90"):
        emulate(lambda: None, arch=90)


def test_numbers_are_rounded_as_pytorch_does() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([0.0, math.inf])])
    for dtype, narrow, widen in (
        (torch.bfloat16, numbers.to_bf16, numbers.from_bf16), (torch.float16, numbers.to_f16, numbers.from_f16)
    ):  # fmt: skip
        with np.errstate(over="ignore"):
            bits = narrow(values.numpy())
        assert np.array_equal(bits.view(np.int16), values.to(dtype).view(torch.int16).numpy())
        assert np.array_equal(widen(bits), values.to(dtype).float().numpy())
    assert np.isnan(numbers.from_bf16(numbers.to_bf16(np.array([np.nan], np.float32)))).all()


def test_tf32_is_rounded_away_from_zero_at_ties() -> None:
    one = np.array([1.0, -1.0, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, np.inf], np.float32)
    rounded = numbers.to_tf32(one.view(np.uint32)).view(np.float32)
    assert rounded.tolist() == [1.0, -1.0, 1 + 2**-10, 1.0, -1 - 2**-10, math.inf]


def test_a_program_is_read() -> None:
    program = parse(
        ".visible .entry f(\n\t.param .u64 .ptr .global .align 1 f_param_0,\n\t.param .u32 f_param_1\n)\n"
        ".reqntid 128\n{\n"
        "\t.reg .pred %p<2>;\n\t.loc 1 5 3 // kernel.py:5:3\n\tld.param.b64 %rd1, [f_param_0];\n$L__BB0_1:\n"
        "\t@!%p1 st.global.v2.b16 [ %rd1 + 4 ], { %rs1, %rs2 };\n\tbra.uni $L__BB0_1;\n\tret;\n}\n"
    )
    assert (program.name, program.parameters, program.threads) == ("f", ("u64", "u32"), 128)
    store = program.code[1]
    assert (store.name, store.modifiers, store.predicate) == ("st", ("global", "v2", "b16"), ("%p1", True))
    assert store.operands == ("[ %rd1 + 4 ]", "{ %rs1, %rs2 }")
    assert store.where == "kernel.py:5:3"
    assert program.labels == {"$L__BB0_1": 1}
    assert program.granule("global") == 2
    with pytest.raises(ValueError, match=r"one \.visible \.entry"):
        parse("// nothing")
