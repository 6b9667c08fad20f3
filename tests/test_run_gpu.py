"""The script for a machine with a GPU, with stand-ins for its driver and its Python: order, limits, what is kept."""

import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.kernels.attention import triton_config
from benchmarks import graphs, harness, runner, tuning

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "run_gpu.sh"
# Writes down what it is asked for; two commands go wrong.
PYTHON = """\
    #!/usr/bin/env bash
    echo "$*" >> "$CALLS"
    case "$*" in
      *"--card swiglu"*) echo "swiglu/odd/fp16: AssertionError"; exit 1;;
      *"bench_rms_norm.py"*"--set"*) echo "a row"; exec sleep 60;;
    esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment in which `nvidia-smi` and the script's Python are stand-ins."""
    for name, text in (("nvidia-smi", "    #!/bin/sh\n    echo GPU\n"), ("python", PYTHON)):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        path.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"),
        "CALLS": str(tmp_path / "calls"), "STEP_LIMIT": "1",
    }  # fmt: skip


def run(machine: dict[str, str], *ops: str) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of the summary, commands)."""
    done = subprocess.run([str(SCRIPT), *ops], env=machine, text=True, capture_output=True, check=False)
    summary = (Path(machine["OUT"]) / "summary.txt").read_text().splitlines()
    return done.returncode, summary, Path(machine["CALLS"]).read_text().splitlines()


def test_steps_come_in_order_and_failures_stop_nothing(machine: dict[str, str]) -> None:
    code, summary, commands = run(machine, "rms_norm", "swiglu")
    names = [line.split()[2] for line in summary]
    groups = list(dict.fromkeys(name.split("-")[0] for name in names))
    assert groups == ["facts", "correctness", "flagship", "training", "tuning", "benchmark"]
    failed = {line.split()[2] for line in summary if line.startswith("FAILED")}
    assert failed == {"correctness-swiglu"} | {name for name in names if name.startswith("tuning-rms_norm")}
    assert code == len(failed) == 5
    assert any("--card rms_norm add_rms_norm" in command for command in commands)
    assert any("bench_swiglu.py --device cuda --save" in c and "2048x11648 and bfloat16" in c for c in commands)


def test_a_step_beyond_its_limit_keeps_its_output(machine: dict[str, str]) -> None:
    _, summary, _ = run(machine, "rms_norm")
    log = Path(machine["OUT"]) / "logs" / "tuning-rms_norm-BACKWARD_PROGRAMS_PER_SM-1.log"
    assert log.read_text() == "a row\n"
    assert any("tuning-rms_norm-BACKWARD_PROGRAMS_PER_SM-1 (exit 124" in line for line in summary)


def test_what_does_not_fit_into_the_limit_is_skipped(machine: dict[str, str]) -> None:
    code, summary, _ = run(machine | {"LIMIT": "0"}, "rope")
    assert code == 0
    assert {line.split()[0] for line in summary} == {"skipped"}


def test_every_flagship_is_a_benchmark() -> None:
    """The sizes that the script names exist: their ids are those that a GPU's parameters have."""
    text = SCRIPT.read_text()
    for op, size in (
        ("rms_norm", (2048, 4352)), ("swiglu", (2048, 11648)), ("rope", (2048, 64, 68, 68)),
        ("linear_cross_entropy", (2048, 4352, 32000)),
    ):  # fmt: skip
        samples = __import__(f"astrobiogen.kernels.{op}.samples", fromlist=["samples"])
        sizes = [*samples.BENCHMARK_SIZES, *getattr(samples, "GPU_BENCHMARK_SIZES", ())]
        assert size in [tuple(vars(one).values()) for one in sizes]
        assert "x".join(str(number) for number in size[:3]) in text


def test_the_sweeps_name_constants_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_config, "TILES", triton_config.TILES)
    tuning.set_constant("attention.triton_config.TILES.86.80.forward=64,32,4,2")
    assert triton_config.tiles(86, 80, torch.bfloat16).forward == triton_config.Tile(64, 32, 4, 2)
    assert triton_config.tiles(86, 64, torch.bfloat16).forward != triton_config.Tile(64, 32, 4, 2)
    for path in SCRIPT.parents[1].glob("astrobiogen/kernels/*/tuning.txt"):
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                name, *values = line.split()
                home, (constant, *_) = tuning.home_of(f"{path.parent.name}.{name}")
                monkeypatch.setattr(home, constant, getattr(home, constant))
                for value in values:
                    tuning.set_constant(f"{path.parent.name}.{name}={value}")


@pytest.mark.parametrize(
    "setting",
    ["attention.triton_config.TILES.86.81.forward=1,1,1,1", "attention.NOTHING=1", "rms_norm.MAX_ROW=x", "rms_norm"],
)
def test_a_constant_that_does_not_exist_is_refused(setting: str) -> None:
    with pytest.raises(pytest.UsageError, match="no such constant"):
        tuning.set_constant(setting)


class Cuda:
    """Notes what is done on which stream."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stream = "default"

    def note(self, what: str) -> None:
        self.done.append(what)

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                cuda.note("record")

            def elapsed_time(self, end: Any) -> float:
                del end
                return 2.0

        return Event()


def test_nothing_waits_between_the_flush_and_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: cuda.note("wait"))
    flush: Any = type("Flush", (), {"zero_": lambda _: cuda.note("flush")})()
    wall, _ = harness._time_cuda(lambda: cuda.note("call"), flush)
    assert cuda.done == ["flush", "record", "call", "record", "wait"]
    assert wall == pytest.approx(2e-3)


def test_a_graph_is_captured_on_the_stream_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Any] = []

    class Capture:
        def __init__(self, graph: Any, stream: Any) -> None:
            assert graph.replay == "replay"
            captured.append(stream)

        def __enter__(self) -> None:
            captured.append("begin")

        def __exit__(self, *_: object) -> None:
            captured.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": "replay"})())
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the benchmark's")
    assert graphs.graphed(lambda: captured.append("call")) == "replay"
    assert captured == ["call", "the benchmark's", "begin", "call", "end"]


def test_rows_are_kept_as_they_come() -> None:
    kept: list[int] = []
    rows: list[harness.Row] = []
    bench = runner.Bench(torch.device("cpu"), True, rows, lambda: kept.append(len(rows)))
    bench.settings = harness.Settings(rounds=1, least_rounds=1, max_rounds=1, warmup=0, placements=1)
    for size in ("a", "b"):
        bench(
            op="double", size=size, dtype=torch.float32, arguments={"x": torch.randn(8)}, differentiable=(),
            ours=lambda x: x + x, reference=lambda x: 2 * x, work=harness.Work(64.0, 0.0), modes=("forward",),
            verified={"x": torch.randn(4)},
        )  # fmt: skip
    assert len(kept) == 2
    assert 0 < kept[0] < kept[1] == len(rows)
