"""Splits by star system and by genus, and the rules that catch leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRAIN, VALIDATION = "train", "validation"
TEST_CELLS = ("seen", "new_planet", "new_organism", "new_both")
CELLS = (TRAIN, VALIDATION, *TEST_CELLS)
SEEN_DRAWS = (0.15, 0.30)
SYSTEM_STEP, SYSTEM_OFFSET = 3, 2
GENUS_STEP, GENUS_OFFSET = 4, 1
VALIDATION_STEP, VALIDATION_OFFSET = 5, 2  # the middle one of every five names that the test set leaves
Named = tuple[float, str]


@dataclass(frozen=True)
class PairKey:
    """What decides the cell of a pair: the star system and genus (held out or not), and system + species (kept
    together).
    """

    star_system: str
    genus: str
    species: str


@dataclass(frozen=True)
class HeldOut:
    """Star systems and genera that training never sees: for the test set, and for validation."""

    test_systems: frozenset[str]
    test_genera: frozenset[str]
    validation_systems: frozenset[str]
    validation_genera: frozenset[str]


def every(names_with_order: Iterable[Named], step: int, offset: int) -> frozenset[str]:
    """Every ``step``-th name, from index ``offset``, after sorting by (number, name): a test set spread evenly over
    the range.

    The number is stellar flux for star systems and the middle of the growth range for genera; no label is looked at.
    """
    ordered = [name for _, name in sorted(names_with_order)]
    return frozenset(ordered[offset::step])


def hold_out(systems: Iterable[Named], genera: Iterable[Named]) -> HeldOut:
    """Names held out for the test set, then, of those that remain, for validation.

    The test set does not depend on the validation rule: it is drawn first. The validation offset keeps the Sun, the
    only system with land, oxygen and measured spectra, in training.

    Parameters
    ----------
    systems, genera
        (number to sort by, name).
    """
    systems, genera = list(systems), list(genera)
    test_systems, test_genera = every(systems, SYSTEM_STEP, SYSTEM_OFFSET), every(genera, GENUS_STEP, GENUS_OFFSET)
    rest = [[item for item in named if item[1] not in test_systems | test_genera] for named in (systems, genera)]
    return HeldOut(test_systems, test_genera, *(every(named, VALIDATION_STEP, VALIDATION_OFFSET) for named in rest))


def unit_hash(text: str) -> float:
    """Number in [0, 1) from SHA-256 of ``text``: the same on every machine and in every order of the pairs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def cell(key: PairKey, held: HeldOut) -> str:
    """Cell of a pair.

    Test first, by the names held out for it; of the pairs without such a name 15 %, by hash of (system, species), are
    "seen". Of what is left, a pair of a validation system or genus is validation, every other pair training. A test
    cell thus may hold pairs of a validation system or genus: they were not trained on either.
    """
    new_planet, new_organism = key.star_system in held.test_systems, key.genus in held.test_genera
    if new_planet and new_organism:
        return "new_both"
    if new_planet:
        return "new_planet"
    if new_organism:
        return "new_organism"
    if SEEN_DRAWS[0] <= unit_hash(f"pair|{key.star_system}|{key.species}") < SEEN_DRAWS[1]:
        return "seen"
    return VALIDATION if key.star_system in held.validation_systems or key.genus in held.validation_genera else TRAIN


def leakage(rows: Sequence[tuple[PairKey, str]], held: HeldOut) -> list[str]:
    """Problems of a split, empty when sound.

    Parameters
    ----------
    rows
        (key, cell) of every pair.
    held
        Names held out; no training pair may be of a validation system or genus, and every validation pair must be.
    """
    problems: list[str] = []
    systems: dict[str, set[str]] = {c: set() for c in CELLS}
    genera: dict[str, set[str]] = {c: set() for c in CELLS}
    groups: dict[tuple[str, str], set[str]] = {}
    for key, name in rows:
        if name not in CELLS:
            problems.append(f"unknown cell {name!r} for {key}")
            continue
        systems[name].add(key.star_system)
        genera[name].add(key.genus)
        groups.setdefault((key.star_system, key.species), set()).add(name)
    for name in ("new_planet", "new_both"):
        for other in (TRAIN, VALIDATION, "seen", "new_organism"):
            if shared := sorted(systems[name] & systems[other]):
                problems.append(f"star systems in both {name} and {other}: {shared}")
    for name in ("new_organism", "new_both"):
        for other in (TRAIN, VALIDATION, "seen", "new_planet"):
            if shared := sorted(genera[name] & genera[other]):
                problems.append(f"genera in both {name} and {other}: {shared}")
    if shared := sorted(systems[TRAIN] & held.validation_systems):
        problems.append(f"validation star systems in {TRAIN}: {shared}")
    if shared := sorted(genera[TRAIN] & held.validation_genera):
        problems.append(f"validation genera in {TRAIN}: {shared}")
    problems += [
        f"{VALIDATION} pair of system {key.star_system} and species {key.species} is of no validation system or genus"
        for key, name in rows
        if name == VALIDATION
        and key.star_system not in held.validation_systems
        and key.genus not in held.validation_genera
    ]
    problems += [
        f"pair of system {s} and species {o} is in several cells: {sorted(c)}"
        for (s, o), c in groups.items()
        if len(c) > 1
    ]
    return problems
