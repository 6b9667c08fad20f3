"""Raw calls with wrong arguments never end the process, and the fuzzer that shows it sees what does."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from astrobiogen import ops
from astrobiogen.testing.fuzzing import report

CALLS = 540  # 20 of each operator
RAW = torch.ops.astrobiogen
INT64 = (-(2**63), 2**63 - 1)

# Each of these calls fails in a way of its own, and the fuzzer must say which.
PLANTED = """
import ctypes, os, signal

import torch

from astrobiogen.testing import fuzz
from astrobiogen.testing.fuzzing.memory import Arena

arena = Arena(slots=2)

def run(index, progress):
    arena.clear()
    inside = arena.place(torch.ones(5, 3), at_end=index != 5)
    progress.running(index, "planted", str(index))
    if index == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    if index == 2:
        while True:
            pass
    if index == 3:
        ctypes.string_at(inside.data_ptr() + 60, 1)
    if index == 4:
        ctypes.string_at(inside.data_ptr() + 59, 1)
    if index == 5:
        ctypes.string_at(inside.data_ptr() - 1, 1)
    if index == 6:
        progress.note(index, fuzz.COMPARING)
        os.abort()
    return fuzz.ACCEPTED, ""

for verdict in fuzz.drive(run, range(8), timeout=1.0):
    print(verdict.index, verdict.outcome, verdict.why)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own: it forks, and this one has threads."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=1800, check=False)


def test_wrong_arguments_end_no_process_and_give_no_wrong_result() -> None:
    done = run("-m", "astrobiogen.testing.fuzz", "--calls", str(CALLS), "--seed", "1")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = {line.split()[0] for line in done.stdout.splitlines() if line and line[0].isalpha()}
    every = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("astrobiogen::")}
    assert every <= names, f"no raw call of {every - names}"


def test_the_fuzzer_sees_signals_hangs_and_reads_beyond_a_tensor() -> None:
    done = run("-c", PLANTED)
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    outcomes = [(outcome, *why) for _, outcome, *why in rows]
    assert outcomes == [
        ("accepted",),
        ("signal", "SIGFPE"),
        ("hang", "did not come back"),
        ("signal", "SIGSEGV"),  # the byte behind
        ("accepted",),  # the last one
        ("signal", "SIGSEGV"),  # the byte before
        ("elsewhere", "SIGABRT"),
        ("accepted",),
    ], f"{done.stdout}\n{done.stderr}"


def edges() -> ops.EdgeLists:
    return ops.edge_lists(torch.tensor([0, 1, 1, 3]), torch.tensor([2, 0, 2, 1]), 4)


@pytest.mark.parametrize("wrong", [10**9, -1, 4, *INT64])
@pytest.mark.parametrize("field", ops.EdgeLists._fields)
def test_edge_lists_made_by_hand_are_refused(field: str, wrong: int) -> None:
    values = getattr(edges(), field).clone()
    values[1] = wrong
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"receiver|sender"):
        ops.edge_attention(q, q, q, None, edges()._replace(**{field: values}))


def test_an_order_that_is_none_of_its_edges_is_refused() -> None:
    good, q = edges(), torch.randn(4, 2, 8)
    for by in (good.by_receiver.flip(0), torch.zeros_like(good.by_receiver), torch.tensor([0, 1, 1, 3])):
        with pytest.raises(ValueError, match="by_receiver and receiver_start must be the order"):
            ops.edge_attention(q, q, q, None, good._replace(by_receiver=by))


def test_lists_on_a_device_whose_values_cannot_be_read_are_checked_by_shape_and_dtype() -> None:
    on_meta = ops.EdgeLists(*(one.to("meta") for one in edges()))
    q = torch.randn(4, 2, 8, device="meta")
    assert ops.edge_attention(q, q, q, None, on_meta).shape == q.shape
    with pytest.raises(ValueError, match=r"edges.by_sender must have shape \(4,\)"):
        ops.edge_attention(q, q, q, None, on_meta._replace(by_sender=on_meta.by_sender[1:]))
    with pytest.raises(TypeError, match=r"edges.sender must be int64"):
        ops.edge_attention(q, q, q, None, on_meta._replace(sender=on_meta.sender.int()))
    with pytest.raises(ValueError, match=r"edges.by_receiver must be on the device of q, meta"):
        ops.edge_attention(q, q, q, None, on_meta._replace(by_receiver=edges().by_receiver))


def test_sparse_tensors_and_meta_tensors_beside_others_are_refused() -> None:
    gate, up = torch.randn(4, 64), torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"astrobiogen::swiglu: all tensors must be dense, got torch.sparse_coo"):
        RAW.swiglu(gate, up.to_sparse())
    with pytest.raises(ValueError, match=r"astrobiogen::swiglu: all tensors must be on one device, got .'cpu', 'meta'"):
        RAW.swiglu(gate, up.to("meta"))


def test_a_freed_storage_is_refused() -> None:
    gate, up = torch.randn(4, 64), torch.randn(4, 64)
    up.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="up must lie inside its storage, got 0 bytes"):
        RAW.swiglu(gate, up)


def test_errors_name_the_op_the_argument_and_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"astrobiogen::swiglu: up must have shape \[4, 64\] .*got \[2, 64\]"):
        RAW.swiglu(torch.randn(4, 64), torch.randn(2, 64))
    with pytest.raises(TypeError, match=r"astrobiogen::rms_norm: x must be float32.*got Int"):
        RAW.rms_norm(torch.ones(2, 8, dtype=torch.int32), torch.randn(8), 1e-6)
    with pytest.raises(ValueError, match=r"astrobiogen::conv_nd: every stride must be in \[1, .*got 0"):
        RAW.conv_nd(torch.randn(1, 2, 8), torch.randn(3, 2, 3), None, [0], [0], [0], [1], 1, 0, False)


def test_the_figures_go_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    counts = {"swiglu": Counter(refused=3, accepted=2), "rope": Counter(signal=1, elsewhere=1)}
    report.update(page, "astrobiogen", False, 0, counts)
    report.update(page, "aten", False, 0, counts)
    report.update(page, "astrobiogen", False, 7, counts)
    text = page.read_text()
    assert "| 2 astrobiogen operators | guard pages | 6 | 3 | 2 | 0 | 1 | 0 | 0 |" in text
    assert text.count("astrobiogen operators") == text.count("aten operators") == 1
    assert "seed 7" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    page.write_text("no table")
    with pytest.raises(ValueError, match="must have the lines"):
        report.update(page, "aten", False, 0, counts)
