"""Raw texts to what a classifier may read, and the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.data.text import SPECIAL_TOKENS, label_words_in
from astrobiogen.datatools.files import unpacked

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_BOILERPLATE = re.compile(
    r"imported (?:from|into)|exoplanet\.eu|parameters listed here|hosted on|to cite biomodels|"
    r"creative commons|copyright|public domain|"
    r"this model (?:is|was) described|article:|doi:|https?:|identified by|j\. |genome biol|bmc |plos|"
    r"pubmed|et al|metabolic network of|@|MODEL\d+|BIOMD\d+",
    re.IGNORECASE,
)
_MODEL_ID = re.compile(r"\b(?:i[A-Z]{1,3}[a-z]?\d{2,5}\w*|[A-Z]{2,5}_?\d{2,}\w*|\w*\d{3,}\w*)\b")
_TEMPERATURE = re.compile(r"\d\s*(?:°|º|degrees|deg\b|K\b|C\b)|temperature|heat|cold|\bwarm", re.IGNORECASE)
MAX_ORGANISM_CHARACTERS = 700


def read_jsonl(path: Path, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a ``.jsonl.gz`` file; a truncated file or a row without ``fields`` is a ``DataError``."""
    try:
        lines = unpacked(path).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise unreadable(path, error) from error
    rows: list[dict[str, str]] = []
    for k, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(path, f"line {k + 1}", f"is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(path, f"line {k + 1}", f"is a {type(row).__name__}, expected an object")
        if missing := [f for f in fields if not isinstance(row.get(f), str)]:
            raise DataError(path, f"line {k + 1}", f"lacks the text fields {missing}")
        rows.append(row)
    return rows


def _without_names(text: str, names: Iterable[str], replacement: str) -> str:
    for name in sorted({n for n in names if len(n) > 2}, key=lambda n: (-len(n), n)):
        text = re.sub(rf"\b{re.escape(name)}\b", replacement, text, flags=re.IGNORECASE)
    return re.sub(rf"(?:{re.escape(replacement)}\W*){{2,}}", f"{replacement} ", text)


def planet_note(text: str, names: Iterable[str]) -> str:
    """Catalogue description without boilerplate, names and every sentence that speaks of temperature, habitability,
    water or life.
    """
    kept = [
        s
        for s in _SENTENCE.split(text)
        if not _BOILERPLATE.search(s)
        and not label_words_in(s)
        and not _TEMPERATURE.search(s)
        and "earth" not in s.lower()
    ]
    return _without_names(" ".join(kept), names, "this planet").strip()


def organism_note(text: str, title: str, species: str, all_species: Iterable[str]) -> str:
    """SBML note without names, model ids, citations and sentences about temperature; at most 700 characters, cut
    between words.

    Args:
        text, title: Note and model name.
        species: Its binomial.
        all_species: Binomials of every organism of the set: a note must not name a relative either.
    """
    body = text.removeprefix(title)
    body = body.split("Abstract:", 1)[1] if "Abstract:" in body else body
    names: set[str] = set()
    for binomial in {species, *all_species}:
        words = binomial.split()
        names |= {
            binomial,
            f"{words[0][0]}. {words[-1]}",
            f"{words[0][0]} {words[-1]}",
            words[0],
            *(w for w in words[1:] if len(w) > 3),
        }
    kept = [
        s
        for s in _SENTENCE.split(body)
        if not _BOILERPLATE.search(s) and not _TEMPERATURE.search(s) and not label_words_in(s)
    ]
    clean = _MODEL_ID.sub("", _without_names(" ".join(kept), names, "the organism"))
    clean = re.sub(r"\(\s*\)|\s+", " ", clean).strip()
    if len(clean) > MAX_ORGANISM_CHARACTERS:
        clean = clean[:MAX_ORGANISM_CHARACTERS].rsplit(" ", 1)[0]
    return clean


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (no unknown token) on ``texts``, which must come from training data only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
