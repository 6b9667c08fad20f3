"""Splits by star system and by genus, and the rules that catch leakage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRAIN, VALIDATION = "train", "validation"
TEST_CELLS = ("seen", "new_planet", "new_organism", "new_both")
CELLS = (TRAIN, VALIDATION, *TEST_CELLS)
VALIDATION_SHARE, SEEN_SHARE = 0.15, 0.15
SYSTEM_STEP, SYSTEM_OFFSET = 3, 2
GENUS_STEP, GENUS_OFFSET = 4, 1


@dataclass(frozen=True)
class PairKey:
    """What decides the cell of a pair: the star system and genus (held out or not), and system + species (kept
    together).
    """

    star_system: str
    genus: str
    species: str


def held_out(names_with_order: Iterable[tuple[float, str]], step: int, offset: int) -> frozenset[str]:
    """Every ``step``-th name, from index ``offset``, after sorting by (number, name): a test set spread evenly over
    the range.

    The number is stellar flux for star systems and the middle of the growth range for genera; no label is looked at.
    """
    ordered = [name for _, name in sorted(names_with_order)]
    return frozenset(ordered[offset::step])


def unit_hash(text: str) -> float:
    """Number in [0, 1) from SHA-256 of ``text``: the same on every machine and in every order of the pairs."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64


def cell(key: PairKey, test_systems: frozenset[str], test_genera: frozenset[str]) -> str:
    """Cell of a pair. Pairs of training systems and genera go to validation (15 %), seen (15 %) or train, by system
    and species.
    """
    new_planet, new_organism = key.star_system in test_systems, key.genus in test_genera
    if new_planet and new_organism:
        return "new_both"
    if new_planet:
        return "new_planet"
    if new_organism:
        return "new_organism"
    draw = unit_hash(f"pair|{key.star_system}|{key.species}")
    if draw < VALIDATION_SHARE:
        return VALIDATION
    return "seen" if draw < VALIDATION_SHARE + SEEN_SHARE else TRAIN


def leakage(rows: Sequence[tuple[PairKey, str]]) -> list[str]:
    """Problems of a split, empty when sound.

    Parameters
    ----------
    rows
        (key, cell) of every pair.
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
    problems += [
        f"pair of system {s} and species {o} is in several cells: {sorted(c)}"
        for (s, o), c in groups.items()
        if len(c) > 1
    ]
    return problems
