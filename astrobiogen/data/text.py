"""Token sequences of the text modality."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from astrobiogen.data.errors import DataError, unreadable

PAD, BOS, EOS, SEP = "<pad>", "<bos>", "<eos>", "<sep>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SEP)
MAX_TEXT_TOKENS = 192
VOCAB_SIZE = 4096
# Words that would give the answer away; no text shown to a classifier may hold one (see docs/data.md).
LABEL_WORDS = (
    "habitab",
    "liquid water",
    "goldilocks",
    "life",
    "biosignature",
    "earth-like",
    "temperate",
    "equilibrium temperature",
    "thermophil",
    "mesophil",
    "psychro",
    "cryophil",
    "hot spring",
    "hydrothermal",
    "optimum temperature",
    "optimal temperature",
    "growth temperature",
    "degrees c",
    "°c",
    "celsius",
    "frozen",
    "ice",
)


@dataclass(frozen=True)
class TextEncoder:
    """Byte-level BPE tokenizer with fixed ids for padding, begin, end and separator."""

    tokenizer: Tokenizer
    max_tokens: int

    def join(self, planet: list[int], organism: list[int], source: str) -> torch.Tensor:
        """Ids [L], ``<bos> planet <sep> organism <eos>``, L at most ``max_tokens``; each text may use the room the
        other leaves.

        Raises:
            DataError: Both texts are without words.
        """
        if not planet and not organism:
            raise DataError(source, "text", "holds no words")
        room = self.max_tokens - 3
        head = planet[: max(room // 2, room - len(organism))]
        tail = organism[: room - len(head)]
        bos, eos, sep = (self.tokenizer.token_to_id(t) for t in (BOS, EOS, SEP))
        return torch.tensor([bos, *head, sep, *tail, eos], dtype=torch.long)

    def encode(self, planet_text: str, organism_text: str, source: str = "text") -> torch.Tensor:
        """``join`` of the ids of two texts."""
        planet, organism = self.tokenizer.encode_batch([planet_text, organism_text], add_special_tokens=False)
        return self.join(planet.ids, organism.ids, source)

    def encode_pairs(self, planets: Mapping[str, str], organisms: Mapping[str, str], source: str) -> PairTokens:
        """Ids of every (planet, organism), each text encoded once; a pair without words is a ``DataError``."""
        ids = [
            {name: self.tokenizer.encode(text, add_special_tokens=False).ids for name, text in texts.items()}
            for texts in (planets, organisms)
        ]
        return PairTokens(self, ids[0], ids[1], source)


class PairTokens(Mapping[tuple[str, str], torch.Tensor]):
    """Ids [L] of every (planet, organism), joined when they are asked for: what is held grows with the texts, not with
    the pairs.
    """

    def __init__(
        self, encoder: TextEncoder, planets: dict[str, list[int]], organisms: dict[str, list[int]], source: str
    ) -> None:
        self._encoder, self._planets, self._organisms, self._source = encoder, planets, organisms, source
        empty = [next((name for name, ids in texts.items() if not ids), None) for texts in (planets, organisms)]
        if empty[0] is not None and empty[1] is not None:
            self[empty[0], empty[1]]  # raises

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the ids."""
        return self._encoder.tokenizer

    def __getitem__(self, key: tuple[str, str]) -> torch.Tensor:
        """Ids of one pair."""
        planet, organism = key
        place = f"{self._source}: text of {planet}, {organism}"
        return self._encoder.join(self._planets[planet], self._organisms[organism], place)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Every (planet, organism)."""
        return itertools.product(self._planets, self._organisms)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._planets) * len(self._organisms)


def load_tokenizer(path: Path) -> Tokenizer:
    """Tokenizer from JSON; a damaged file or one without the four special tokens is a ``DataError``."""
    if not path.is_file():
        raise DataError(path, "", "tokenizer file is missing")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    return tokenizer_of(text, path)


def tokenizer_of(text: str, source: str | Path) -> Tokenizer:
    """Tokenizer from the text of its JSON; ``source`` is for messages. Raises as ``load_tokenizer``."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the binding raises bare Exception for every kind of damage
        raise DataError(source, "", f"is not a tokenizer ({error})") from error
    if missing := [t for t in SPECIAL_TOKENS if tokenizer.token_to_id(t) is None]:
        raise DataError(source, "special tokens", f"lacks {missing}")
    return tokenizer


def label_words_in(text: str) -> list[str]:
    """The label-bearing words that ``text`` holds (whole words for the short ones), empty when it is clean."""
    padded = f" {text.lower()} "
    for mark in ".,;:()":
        padded = padded.replace(mark, " ")
    return [w for w in LABEL_WORDS if (f" {w} " in padded if w in ("life", "ice") else w in padded)]
