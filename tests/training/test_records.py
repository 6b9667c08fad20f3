"""The log of a long run: read without holding it, thinned, cut into compressed parts, whole after every kill."""

import gzip
import itertools
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from astrobiogen.training.config import MonitorConfig
from astrobiogen.training.evaluation import plots, report
from astrobiogen.training.observe import records
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.observe.records import Rotation, parts, read_log, torn

PLAIN = MonitorConfig(progress="plain", level="ERROR")


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "time": 1.5, "step": number, "update": number, "loss": 1 / number, "skipped": False} | more


def write(path: Path, records: list[dict[str, Any]], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + tail)


def plainly(path: Path) -> list[dict[str, Any]]:
    """What the log says, by parsing all of it."""
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        event, at = record.get("event"), record.get("step", 0)
        if event == "resumed":
            records = {key: old for key, old in records.items() if old.get("step", 0) <= at}
        key = (event, at) if event in ("step", "epoch") else (event, at, number)
        records.pop(key, None)
        records[key] = record
    return list(records.values())


@pytest.mark.parametrize("seed", range(20))
def test_a_log_reads_as_if_never_interrupted(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    lines, at = [], 0
    for _ in range(300):
        kind = generator.choices(("step", "epoch", "saved", "resumed", "odd", "torn"), (60, 5, 10, 5, 5, 5))[0]
        if kind == "resumed":
            at = generator.randrange(at + 1)
            lines.append(json.dumps({"event": "resumed", "time": 2.0, "step": at, "checkpoint": "{"}))
        elif kind == "odd":  # not in our order, or without a step
            lines.append(generator.choice(('{"step": 3, "event": "x"}', '{"event": "gpu"}', "[1]", "3", "")))
        elif kind == "torn":
            whole = json.dumps(step(at + 1, parts={"a": 1.0}, text="{ }"))
            lines.append(whole[: generator.randrange(len(whole))])
        else:
            at += kind == "step" and generator.random() < 0.9
            record = {"event": kind, "time": 3.0, "step": at or 1, "why": generator.choice(("a", "}", '"{', "\n"))}
            lines.append(json.dumps(record))
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(line for line in lines if line not in ("[1]", "3")) + '\n{"event": "st')
    expected = plainly(path)
    log = read_log(path)
    assert list(log) == expected
    assert log == expected
    assert len(log) == len(expected)
    assert log[-1] == expected[-1]
    assert log[5:9] == expected[5:9]


def test_missing_and_empty_logs_and_lines_of_another_kind(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "log.jsonl")) == []
    (tmp_path / "log.jsonl").write_bytes(b"")
    assert read_log(tmp_path / "log.jsonl").thinned(3) == []
    (tmp_path / "log.jsonl").write_bytes(b"[1]\n3\n\xff\n" + json.dumps(step(1)).encode() + b"\n")
    assert list(read_log(tmp_path / "log.jsonl")) == [step(1)]


def test_a_thinned_log_keeps_ends_and_skipped_updates(tmp_path: Path) -> None:
    records = [step(number, skipped=number in (17, 400)) for number in range(1, 1001)]
    epochs = [{"event": "epoch", "time": 1.0, "step": number} for number in (500, 1000)]
    write(tmp_path / "log.jsonl", records + epochs)
    few = read_log(tmp_path / "log.jsonl").thinned(50)
    steps = [record["step"] for record in few if record["event"] == "step"]
    assert 50 <= len(steps) <= 52
    assert {1, 17, 400, 1000} <= set(steps)
    assert [record for record in few if record["event"] == "epoch"] == epochs
    figures = {"validation": dict.fromkeys(("loss", "accuracy", "auroc", "ece", "class_loss"), 0.5)}
    shown = [record | {"speed": {"samples_per_second": 1.0, "tokens_per_second": 1.0, "mfu": 0.5}} for record in few]
    shown = [record for record in shown if record["event"] == "step"]
    assert "about one in 20" in report._training(
        [*shown, {"event": "epoch", "step": 1000, "best": False, "epoch": 0} | figures]
    )
    rated = [record | {"learning_rate": 1.0, "gradient_norm": 1.0} for record in few]
    assert "2 updates skipped" in plots.optimisation(rated)


def test_opening_reads_the_tail_only(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte: whoever reads it whole does not come back
        file.seek(2**40)
        file.write(b'{"event": "st')
    assert torn(path)
    started = time.monotonic()
    with Monitor(tmp_path, PLAIN):
        pass
    assert time.monotonic() - started < 5
    path.write_bytes(b"{}\n")
    assert not torn(path)


def recorded(folder: Path, first: int, last: int) -> None:
    with Monitor(folder, PLAIN) as monitor:
        for number in range(first, last):
            monitor.record("step", step=number, loss=0.5, skipped=False)


def test_a_long_log_is_cut_into_compressed_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rotation.__init__, "__defaults__", (5000,))
    recorded(tmp_path, 1, 300)
    recorded(tmp_path, 300, 501)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("log"))
    assert names[0] == "log-0001.jsonl.gz"
    assert names[-1] == "log.jsonl"
    assert len(names) >= 5
    assert all(name.endswith(".gz") for name in names[:-1])
    whole = sum(len(gzip.decompress(path.read_bytes())) for path in tmp_path.glob("log-*.gz"))
    assert sum(path.stat().st_size for path in tmp_path.glob("log-*.gz")) < whole / 5
    log = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 501))
    assert [record["step"] for record in log.thinned(5)] == [1, 126, 251, 375, 500]


@pytest.mark.parametrize("left", ["plain", "both", "aside"])
def test_a_kill_while_a_part_is_closed_loses_nothing(tmp_path: Path, left: str) -> None:
    write(tmp_path / "log-0001.jsonl", [step(1), step(2)])
    write(tmp_path / "log.jsonl", [step(3)])
    if left == "both":
        with gzip.open(tmp_path / "log-0001.jsonl.gz", "wb") as file:
            file.write((tmp_path / "log-0001.jsonl").read_bytes())
    if left == "aside":
        (tmp_path / "log-0001.jsonl.gz.tmp").write_bytes(b"half")
    expected = [step(1), step(2), step(3)]
    assert list(read_log(tmp_path / "log.jsonl")) == expected
    with Monitor(tmp_path, PLAIN):
        pass
    assert [path.name for path in parts(tmp_path / "log.jsonl")] == ["log-0001.jsonl.gz", "log.jsonl"]
    assert len(list(tmp_path.glob("log*"))) == 2
    assert list(read_log(tmp_path / "log.jsonl")) == expected


def test_a_full_disk_leaves_a_part_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "log-0001.jsonl", [step(1)])
    monkeypatch.setattr(records.os, "fsync", full)
    records._compress(tmp_path / "log-0001.jsonl")
    assert "stays as it is" in caplog.text
    assert list(read_log(tmp_path / "log.jsonl")) == [step(1)]


def test_a_large_log_is_read_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """A twentieth of a million records here; `docs/reliability.md` has the figures of a million."""
    count = 50_000
    filler = {f"part_{number}": 0.123456789012345 for number in range(12)}
    lines = [json.dumps(step(number, parts=filler)) + "\n" for number in range(1, count + 1)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    started = time.process_time()
    log = read_log(tmp_path / "log.jsonl")
    few = log.thinned(4000)
    assert time.process_time() - started < 1.5  # a twentieth of the records in a third of the time: machines are busy
    assert (len(log), len(few)) == (count, 4000)
    (tmp_path / "log.jsonl").write_text("".join(lines[: count // 4]))
    del log, few, lines
    tracemalloc.start()
    assert len(read_log(tmp_path / "log.jsonl").thinned(100)) == 100
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20  # of 5 MiB of text, 50 MiB parsed
    tracemalloc.stop()


def test_compressed_parts_are_read_as_streams_and_thinned_in_one_pass(tmp_path: Path) -> None:
    count = 30_000
    lines = [
        json.dumps(step(number, skipped=number == 12_345, text="x" * 300)) + "\n" for number in range(1, count + 1)
    ]
    for part, first in enumerate(range(0, count - 1000, 10_000)):
        with gzip.open(tmp_path / f"log-{part + 1:04d}.jsonl.gz", "wb", 1) as file:
            file.write("".join(lines[first : min(first + 10_000, count - 1000)]).encode())
    (tmp_path / "log.jsonl").write_text("".join(lines[-1000:]))
    tracemalloc.start()
    log = read_log(tmp_path / "log.jsonl")
    few = log.thinned(100)
    assert tracemalloc.get_traced_memory()[1] < 6 * 2**20  # of 12 MiB of text
    tracemalloc.stop()
    steps = [record["step"] for record in few]
    assert len(few) <= 101
    assert steps[-1] == count
    assert 12_345 in steps
    assert max(after - before for before, after in itertools.pairwise(steps)) < 2 * count / 100
    assert all(log[number - 1] == record for number, record in zip(steps, few, strict=True))
    packed = tmp_path / "log-0002.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-1000])
    with pytest.raises(EOFError, match="log-0002"):
        read_log(tmp_path / "log.jsonl")
