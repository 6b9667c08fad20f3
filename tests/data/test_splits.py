"""Splits: what a name decides, what the bundled sample pins, and that no newcomer moves anybody."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrobiogen.data import splits
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.storage.pack import Pack, held_out, open_pack, parts_of
from astrobiogen.datatools.builders.run import placed
from astrobiogen.datatools.check import check

NAMES = st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=12), max_size=6, unique=True)


@pytest.fixture(scope="module")
def sample() -> Pack:
    return open_pack(SAMPLE_FOLDER)


def cells(pack: Pack) -> dict[tuple[str, int, str], str]:
    """Cell of every (climate, organism), as a build places them."""
    parts = parts_of(pack.climates, pack.organisms, placed(Path("/nowhere")))
    held = held_out(parts)
    found: dict[tuple[str, int, str], str] = {}
    rows: list[tuple[splits.PairKey, str]] = []
    for place in pack.climates:
        for organism in pack.organisms:
            key = splits.PairKey(place.star_system, organism.genus, organism.species)
            name = found[place.planet, place.epoch, organism.organism] = splits.cell(key, held)
            rows.append((key, name))
    assert splits.leakage(rows, held) == []
    return found


def test_the_sample_keeps_its_split(sample: Pack) -> None:
    assert cells(sample) == {(p.planet, p.epoch, p.organism): p.cell for p in sample.pairs}


@settings(deadline=None, max_examples=25)
@given(systems=NAMES, genera=NAMES, gone=st.integers(0, 13))
def test_newcomers_and_leavers_move_nobody(sample: Pack, systems: list[str], genera: list[str], gone: int) -> None:
    before = cells(sample)
    left = sorted({c.star_system for c in sample.climates})[gone]
    climates = [c for c in sample.climates if c.star_system != left]
    flux = np.linspace(1.0, 5000.0, max(len(systems), 1))  # between, below and above all others
    climates += [
        dataclasses.replace(climates[0], planet=f"new {name}", star_system=f"new {name}", params=(f,))
        for name, f in zip(systems, flux.tolist(), strict=False)
    ]
    organisms = list(sample.organisms)
    organisms += [
        dataclasses.replace(organisms[0], organism=f"new {g}", genus=f"new {g}", species=f"new {g} x", niche_low=-9.0)
        for g in genera
    ]
    after = cells(dataclasses.replace(sample, climates=tuple(climates), organisms=tuple(organisms)))
    assert len(after) == len(climates) * len(organisms)
    stayed = {key: cell for key, cell in after.items() if key in before}
    assert len(stayed) == len([c for c in climates if not c.planet.startswith("new ")]) * len(sample.organisms)
    assert stayed == {key: before[key] for key in stayed}
    # and the newcomers are where each would be alone
    for kind, names in ((splits.STAR_SYSTEM, systems), (splits.GENUS, genera)):
        parts = {row.name: row.part for row in parts_of(climates, organisms, {}) if row.kind == kind}
        assert all(parts[f"new {name}"] == splits.part_by_name(kind, f"new {name}") for name in names)


@pytest.mark.parametrize("kind", splits.KINDS)
def test_shares_of_new_names(kind: str) -> None:
    found = [splits.part_by_name(kind, f"name {k}") for k in range(6000)]
    test = splits.TEST_SHARE[kind]
    for part, share in ((splits.TEST, test), (splits.VALIDATION, splits.VALIDATION_SHARE * (1 - test))):
        # four standard deviations of a binomial number
        assert abs(found.count(part) / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5, part


def test_how_the_sample_was_drawn(sample: Pack) -> None:
    """Every third system by stellar flux and every fourth genus by growth range is test, the middle one of every five
    that remain validation, as the data card says.
    """

    def every(numbers: dict[str, list[float]], step: int, offset: int) -> set[str]:
        return set(sorted(numbers, key=lambda n: (np.mean(numbers[n]), n))[offset::step])

    flux: dict[str, list[float]] = {}
    middle: dict[str, list[float]] = {}
    for c in sample.climates:
        flux.setdefault(c.star_system, []).append(c.params[0])
    for o in sample.organisms:
        middle.setdefault(o.genus, []).append((o.niche_low + o.niche_high) / 2)
    held = held_out(sample.parts)
    for numbers, step, offset, test, validation in (
        (flux, 3, 2, held.test_systems, held.validation_systems),
        (middle, 4, 1, held.test_genera, held.validation_genera),
    ):
        assert every(numbers, step, offset) == test
        assert every({n: v for n, v in numbers.items() if n not in test}, 5, 2) == validation
    assert {row.source for row in sample.parts} == {"sample"}


def test_wrong_parts_are_found(pack_copy: Path, reseal: Callable[[Path, str], None]) -> None:
    path = pack_copy / "split.csv"
    text = path.read_text()
    path.write_text(
        text.replace("GJ 273,train,sample", "GJ 273,test,sample").replace("genus,Vibrio,train,sample\n", "")
    )
    reseal(pack_copy, "split.csv")
    found = "\n".join(check(pack_copy))
    assert "star_system GJ 273 is test in split.csv, by its source (sample) train" in found
    assert "genus Vibrio has no part in split.csv" in found
    assert "195 pairs are not in the cell that split.csv and the stated rule give" in found
    path.write_text(text.replace("GJ 273,train,sample", "GJ 273,train,whim"))
    reseal(pack_copy, "split.csv")
    assert check(pack_copy) == ["split: star_system GJ 273 is train in split.csv, by its source (whim) None"]


def test_packs_of_the_older_format_are_named(pack_copy: Path) -> None:
    manifest = json.loads((pack_copy / "manifest.json").read_text())
    (pack_copy / "manifest.json").write_text(json.dumps({**manifest, "format": "astrobiogen-pack-1"}))
    assert "is 'astrobiogen-pack-1', expected 'astrobiogen-pack-2': build the pack anew" in check(pack_copy)[0]
