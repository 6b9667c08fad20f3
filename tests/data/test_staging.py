"""What is written beside a file or folder that is replaced: nobody else's is touched, and nothing is half there."""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from astrobiogen import data
from astrobiogen.data.__main__ import main
from astrobiogen.data.storage import pack
from astrobiogen.datatools.builders import run
from astrobiogen.datatools.builders.work import Work
from astrobiogen.datatools.climates import store
from astrobiogen.datatools.fetch import download
from astrobiogen.system import staging

FORK = multiprocessing.get_context("fork")


def a_pack(folder: Path, text: str) -> None:
    """The least that counts as a packed dataset."""
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "x.txt").write_text(text)
    manifest = {"format": pack.FORMAT, "files": {"part/x.txt": {}}, "counts": {"climates": 1}}
    (folder / pack.MANIFEST).write_text(json.dumps(manifest))


def content(folder: Path) -> str:
    return (folder / "part" / "x.txt").read_text()


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw" / "climate").mkdir(parents=True)
    return tmp_path / "raw"


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that takes no time."""

    def build(work: Work, _psg_tables: bool) -> None:
        work.output.rmdir()
        a_pack(work.output, "new")

    monkeypatch.setattr(run, "_build", build)


@pytest.mark.usefixtures("building")
def test_a_build_touches_nothing_but_its_output(raw: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    a_pack(place / "keep", "old")
    for name in ("keep.old", "keep.part", ".keep.astrobiogen-0123abcd", ".keep.astrobiogen-mine"):
        (place / name).mkdir()
        (place / name / "thesis.tex").write_text("mine")
    before = tree(place)
    run.build(raw, place / "keep")
    assert content(place / "keep") == "new"
    after = tree(place)
    assert {name: text for name, text in after.items() if not name.startswith("keep/")} == {
        name: text for name, text in before.items() if not name.startswith("keep/")
    }
    assert {path.name for path in place.iterdir()} == {
        "keep", "keep.old", "keep.part", ".keep.astrobiogen-0123abcd", ".keep.astrobiogen-mine"
    }  # fmt: skip


@pytest.mark.usefixtures("building")
def test_a_linked_output_is_built_where_it_points_to(raw: Path, tmp_path: Path) -> None:
    a_pack(tmp_path / "large disk" / "pack", "old")
    for name, target in (("whole", "large disk/pack"), ("dangling", "large disk/new pack")):
        link = tmp_path / name
        link.symlink_to(target)
        run.build(raw, link)
        assert link.is_symlink()
        assert content(tmp_path / target) == "new"
    assert {path.name for path in (tmp_path / "large disk").iterdir()} == {"pack", "new pack"}


@pytest.mark.usefixtures("building")
def test_what_is_no_pack_or_more_than_one_is_not_replaced(raw: Path, tmp_path: Path) -> None:
    site, mixed = tmp_path / "site", tmp_path / "mixed"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    a_pack(mixed, "old")
    (mixed / "part" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(data.DataError, match=r"not a packed dataset .*; nothing was changed"):
        run.build(raw, site)
    with pytest.raises(data.DataError, match=r"part/notes\.txt.* would be lost .1 such files.; nothing was changed"):
        run.build(raw, mixed)
    assert tree(tmp_path) == before


def test_of_two_builds_to_one_output_one_is_refused_by_name(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started, go_on = FORK.Event(), FORK.Event()

    def build(work: Work, _psg_tables: bool) -> None:
        started.set()
        go_on.wait(30)
        work.output.rmdir()
        a_pack(work.output, "first")

    monkeypatch.setattr(run, "_build", build)
    first = FORK.Process(target=run.build, args=(raw, tmp_path / "pack"))
    first.start()
    assert started.wait(30)
    (tmp_path / "link").symlink_to("pack")
    before = sorted(tmp_path.rglob("*"))
    for name in ("pack", "link"):
        assert main(["build", "--raw", str(raw), "--output", str(tmp_path / name)]) == 2
        assert f"another process is making it (process {first.pid} on " in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    go_on.set()
    first.join(30)
    assert first.exitcode == 0
    assert content(tmp_path / "pack") == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "pack", "link"}


def test_what_a_killed_build_left_is_cleared_and_the_old_pack_put_back(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pack"

    def killed(at: str) -> None:
        """Build in another process that kills itself: while it builds, or between its two renames."""

        def build(work: Work, _psg_tables: bool) -> None:
            if at == "building":
                os.kill(os.getpid(), signal.SIGKILL)
            work.output.rmdir()
            a_pack(work.output, "new")

        def rename(path: Path, to: Path) -> Path:
            os.rename(path, to)
            if to.name == staging.OLD:
                os.kill(os.getpid(), signal.SIGKILL)
            return to

        with monkeypatch.context() as patch:
            patch.setattr(run, "_build", build)
            patch.setattr(Path, "rename", rename)
            process = FORK.Process(target=run.build, args=(raw, target))
            process.start()
            process.join(30)
            assert process.exitcode == -signal.SIGKILL

    a_pack(target, "old")
    killed("building")
    assert content(target) == "old"
    killed("between")
    assert not target.exists()
    assert len(staging.leftovers(target)) == 1  # the first one's was cleared away by the second
    monkeypatch.setattr(run, "_build", lambda *_: (_ for _ in ()).throw(data.DataError("raw", "", "unusable")))
    with pytest.raises(data.DataError, match="unusable"):
        run.build(raw, target)
    assert content(target) == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "pack"}


def test_a_file_is_staged_alone_and_put_in_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    (tmp_path / "table.csv.part").write_text("mine")

    def write(number: int) -> None:
        with staging.staged(path) as part:
            part.write_text(str(number) * 10_000)

    processes = [FORK.Process(target=write, args=(number,)) for number in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(path.read_text()) == 10_000
    assert len(set(path.read_text())) == 1
    download.keep(path, b"body")
    with contextlib.suppress(KeyError), staging.staged(path) as part:
        part.write_text("half")
        raise KeyError
    with pytest.raises(FileExistsError), staging.staged(path, new=True) as part:
        part.write_text("new")
    assert tree(tmp_path) == {"table.csv": "body", "table.csv.part": "mine"}


def test_a_store_that_appears_while_it_is_written_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "climates.nc"

    @contextlib.contextmanager
    def created(part: Path, *_: Any) -> Any:
        part.write_text("ours")
        path.write_text("theirs")
        yield {}

    monkeypatch.setattr(store, "_created", created)
    with pytest.raises(FileExistsError, match="nothing was changed"):
        store.write_store(path, [], [], None, [])  # type: ignore[arg-type]
    assert tree(tmp_path) == {"climates.nc": "theirs"}
