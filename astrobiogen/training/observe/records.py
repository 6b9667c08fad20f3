"""log.jsonl on disk: read without holding it in memory, and cut into compressed parts as it grows.

A run of four weeks writes gigabytes. At 64 MiB log.jsonl becomes `log-0001.jsonl`, which a thread compresses to
`log-0001.jsonl.gz` (a quarter of the size); whatever is killed in between, each record is in one of the files.
"""

import array
import contextlib
import itertools
import json
import logging
import operator
import os
import re
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from astrobiogen.training.observe.unpacking import unpacked

Record = dict[str, Any]
PART_BYTES = 64 * 2**20
_LOG = logging.getLogger("astrobiogen")
# The beginning that our own records have: enough to tell what one is without parsing it.
_HEAD = re.compile(rb'\{"event": "(\w+)", "time": [^,{}]*(?:, "step": (-?\d+))?[,}]').match
# The number of a whole line that is the record of a step, as almost all are.
_STEPS = re.compile(rb'^\{"event": "step", "time": [^,{}\n]*, "step": (\d+)[,}][^\n]*(?<=\})\n', re.MULTILINE).findall
_SKIPPED = b'"skipped": true'
_RESUMED, _SPECIAL = 2, 3
_LINES = 1024
_HELD = 64  # of so many lines in a compressed part one is held, so that thinning need not unpack the part again
_COPY = 1 << 20
_PATIENCE = 20.0  # seconds that the end of a run waits for a compression


def parts(path: Path) -> list[Path]:
    """The files of the log `path`, oldest first, `path` itself last."""
    found = {}
    for part in path.parent.glob(f"{path.stem}-*{path.suffix}*"):
        match = re.fullmatch(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}(\.gz)?", part.name)
        if match and (match[2] or int(match[1]) not in found):  # a whole compressed part goes before what it was
            found[int(match[1])] = part
    return [*(found[number] for number in sorted(found)), *([path] if path.exists() else [])]


def torn(path: Path) -> bool:
    """Whether the last line of `path` was cut by a kill; reads one byte."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _opened(part: Path) -> BinaryIO:
    return unpacked(part) if part.suffix == ".gz" else part.open("rb")


class Log(Sequence[Record]):
    """The records of a run in order, as if it had never been interrupted. Each is parsed when it is asked for.

    A line torn by a kill is left out, and so are records that a resumed run made anew: those after the step it went on
    from, and the earlier one of two "step" or "epoch" records of the same step.
    """

    def __init__(self, path: Path) -> None:
        self._parts = parts(path)
        self._kinds = {b"step": 0, b"epoch": 1, b"resumed": _RESUMED}
        self._newest = [-1, -1]  # largest step so far of the first two: of these a step has one record
        self._part, self._offset = array.array("H"), array.array("q")
        self._step, self._kind = array.array("q"), array.array("B")
        self._marked = array.array("B")  # skipped updates
        self._held: dict[tuple[int, int], bytes] = {}  # lines of compressed parts, by part and offset
        for number, part in enumerate(self._parts):
            with _opened(part) as file:
                self._scan(number, file)

    def _scan(self, number: int, file: BinaryIO) -> None:
        offset = 0
        while lines := list(itertools.islice(file, _LINES)):
            together = b"".join(lines)
            whole = together.count(b"{") == together.count(b"}")  # looked at together: a torn line is rare
            marks = [_SKIPPED in line for line in lines] if _SKIPPED in together else [False] * len(lines)
            if self._parts[number].suffix == ".gz":
                self._hold(number, offset, lines, marks)
            if whole and self._take_steps([int(step) for step in _STEPS(together)], lines, number, offset, marks):
                offset += len(together)
                continue
            for line, marked in zip(lines, marks, strict=True):
                match = _HEAD(line)
                if match and line[-2:] == b"}\n" and (whole or line.count(b"{") == line.count(b"}")):
                    self._take(match[1], int(match[2] or 0), number, offset, marked)
                elif found := _parsed(line):
                    self._take(*found, number, offset, marked)
                offset += len(line)

    def _hold(self, part: int, offset: int, lines: list[bytes], marks: list[bool]) -> None:
        starts = list(itertools.accumulate(map(len, lines), initial=offset))
        for place in {*range(0, len(lines), _HELD), *(np.flatnonzero(marks).tolist() if True in marks else ())}:
            self._held[part, starts[place]] = lines[place]

    def _take_steps(self, steps: list[int], lines: list[bytes], part: int, offset: int, marks: list[bool]) -> bool:
        """Take in `lines` at once if all are records of steps that grow, as `steps` says; False if they are not."""
        if len(steps) != len(lines) or steps[0] <= self._newest[0] or any(map(operator.ge, steps, steps[1:])):
            return False
        self._newest[0] = steps[-1]
        count = len(steps)
        self._part.extend(itertools.repeat(part, count))
        self._offset.extend(itertools.accumulate(map(len, lines[:-1]), initial=offset))
        self._step.extend(steps)
        self._kind.extend(itertools.repeat(self._kinds[b"step"], count))
        self._marked.extend(marks)
        return True

    def _take(self, event: bytes, step: int, part: int, offset: int, marked: bool) -> None:
        kind = self._kinds.get(event)
        if kind is None:
            kind = self._kinds[event] = len(self._kinds)
        if kind < _SPECIAL:
            self._replace(kind, step)
        self._part.append(part)
        self._offset.append(offset)
        self._step.append(step)
        self._kind.append(kind)
        self._marked.append(marked)

    def _replace(self, kind: int, step: int) -> None:
        """Drop what a record of a special kind stands for."""
        newest = self._newest
        if kind == _RESUMED:
            self._keep(np.frombuffer(self._step, np.int64) <= step)
            self._newest = [min(step, old) for old in newest]
        elif step > newest[kind]:  # as a rule steps only grow
            newest[kind] = step
        else:
            other = np.frombuffer(self._kind, np.uint8) != kind
            self._keep((np.frombuffer(self._step, np.int64) != step) | other)

    def _keep(self, which: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        if which.all():
            return
        for column in (self._part, self._offset, self._step, self._kind, self._marked):
            kept = np.frombuffer(column, column.typecode)[which].tobytes()
            del column[:]
            column.frombytes(kept)

    def __len__(self) -> int:
        return len(self._offset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """One record, or a list of some."""
        chosen = range(len(self))[index]
        return next(self._read([chosen])) if isinstance(chosen, int) else list(self._read(chosen))

    def __iter__(self) -> Iterator[Record]:
        return self._read(range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def _read(self, indices: Sequence[int]) -> Iterator[Record]:
        """The records `indices`, ascending within each part."""
        opened, file = -1, None
        try:
            for index in indices:
                if line := self._held.get((self._part[index], self._offset[index])):
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)
                    continue
                if self._part[index] != opened:
                    if file is not None:
                        file.close()
                    opened = self._part[index]
                    file = _opened(self._parts[opened])
                assert file is not None
                file.seek(self._offset[index])
                with contextlib.suppress(ValueError):  # torn where the braces of a text made it look whole
                    yield json.loads(file.readline())
        finally:
            if file is not None:
                file.close()

    def _at_hand(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Those of `places` whose part need not be unpacked again, and the last one."""
        packed = [part.suffix == ".gz" for part in self._parts]
        keys = zip((self._part[place] for place in places), (self._offset[place] for place in places))
        kept = np.fromiter((not packed[key[0]] or key in self._held for key in keys), bool, len(places))
        kept[-1] = True
        return places[kept]

    def thinned(self, most: int) -> list[Record]:
        """At most `most` records of each kind, evenly spread, the last one among them; and every skipped update."""
        kinds, marked = np.frombuffer(self._kind, np.uint8), np.frombuffer(self._marked, np.uint8)
        kept = marked.astype(bool)
        for kind in self._kinds.values():
            places = np.flatnonzero(kinds == kind)
            even = places[np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(np.int64)]
            if len(places) >= 2 * most * _HELD:  # those at hand lie close enough
                near = self._at_hand(places)
                even = near[np.searchsorted(near, even)]
            kept[even] = True
        return list(self._read(np.flatnonzero(kept).tolist()))


def _parsed(line: bytes) -> tuple[bytes, int] | None:
    """Event and step of a line that does not look like one of ours; None if a kill has cut it."""
    try:
        record = json.loads(line)
        return str(record.get("event")).encode(), int(record.get("step", 0))
    except (ValueError, AttributeError, TypeError):
        return None


def read_log(path: Path) -> Log:
    """The log `path` and its earlier parts; see `Log`."""
    for _ in range(3):
        try:
            return Log(path)
        except FileNotFoundError as error:
            _LOG.debug("read anew: a part was compressed while it was read (%s)", error)
    return Log(path)


class Rotation:
    """Cuts the log `path` into parts of `most` bytes and compresses those that are closed."""

    def __init__(self, path: Path, most: int = PART_BYTES) -> None:
        self._path, self._most = path, most
        self._size = path.stat().st_size if path.exists() else 0
        self._threads: list[threading.Thread] = []
        for part in path.parent.glob(f"{path.stem}-*{path.suffix}.gz.tmp"):
            part.unlink()
        for part in parts(path)[:-1]:  # closed before the process that should have compressed them was killed
            if part.suffix != ".gz":
                self._compress(part)
            else:
                part.with_suffix("").unlink(missing_ok=True)

    def after(self, file: Any, written: int) -> Any:
        """The file to write to from now on, after `written` more bytes went to `file`."""
        self._size += written
        if self._size < self._most:
            return file
        number = len(parts(self._path))
        closed = self._path.with_name(f"{self._path.stem}-{number:04d}{self._path.suffix}")
        try:
            self._path.rename(closed)
            fresh = self._path.open("ab", buffering=0)
        except OSError as error:  # full or stalled: one long file is better than none
            _LOG.warning("%s cannot begin a new part (%s); tried again later", self._path, error)
            self._size = 0
            return file
        file.close()
        self._size = 0
        self._compress(closed)
        return fresh

    def _compress(self, part: Path) -> None:
        thread = threading.Thread(target=_compress, args=(part,), name="log compression", daemon=True)
        thread.start()
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]

    def close(self) -> None:
        """Wait for compressions; what is not done then is done when the run is resumed."""
        for thread in self._threads:
            thread.join(_PATIENCE)


def _compress(part: Path) -> None:
    """`part` as `<part>.gz`, which appears whole or not at all."""
    final = part.with_name(f"{part.name}.gz")
    aside = part.with_name(f"{part.name}.gz.tmp")
    packer = zlib.compressobj(wbits=31)
    try:
        with part.open("rb") as source, aside.open("wb") as target:
            while piece := source.read(_COPY):
                target.write(packer.compress(piece))
            target.write(packer.flush())
            target.flush()
            os.fsync(target.fileno())
        aside.rename(final)
        part.unlink()
    except OSError as error:
        _LOG.warning("%s stays as it is, it could not be compressed: %s", part, error)
