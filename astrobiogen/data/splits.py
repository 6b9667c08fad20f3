"""Splits by star system and by genus, and the rules that catch leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)
TEST_CELLS = ("seen", "new_planet", "new_organism", "new_both")
CELLS = (TRAIN, VALIDATION, *TEST_CELLS)
SEEN_DRAWS = (0.15, 0.30)
STAR_SYSTEM, GENUS = "star_system", "genus"
KINDS = (STAR_SYSTEM, GENUS)
TEST_SHARE = {STAR_SYSTEM: 1.0 / 3.0, GENUS: 1.0 / 4.0}
VALIDATION_SHARE = 1.0 / 5.0  # of what the test set leaves


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


def unit_hash(text: str) -> float:
    """Number in [0, 1) from SHA-256 of ``text``: the same on every machine and in every order of the pairs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def part_by_name(kind: str, name: str) -> str:
    """Part of a star system or genus that nobody has placed, from its name alone: no other name can move it.

    A third of the star systems and a quarter of the genera are test, a fifth of the rest validation, by hash.
    """
    number, share = unit_hash(f"part|{kind}|{name}"), TEST_SHARE[kind]
    if number < share:
        return TEST
    return VALIDATION if number < share + VALIDATION_SHARE * (1.0 - share) else TRAIN


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

    Args:
        rows: (key, cell) of every pair.
        held: Names held out; no training pair may be of a validation system or genus, and every validation pair must
            be.
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
