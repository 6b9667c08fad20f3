"""The language corpus: OpenStax *Astronomy 2e* (CC BY 4.0), for language-model training."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

from astrobiogen.data.errors import DataError, unreadable
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.storage.guarded import MOST_UNPACKED, unxz
from astrobiogen.data.storage.pack import read_manifest, verified_bytes

CORPUS = "corpus.jsonl.xz"


@dataclass(frozen=True)
class Module:
    """One section of the book; ``part`` is "train" or "validation" (about a tenth, never seen by the tokenizer)."""

    chapter: str
    module: str
    title: str
    text: str
    part: str


def load_corpus(path: str | Path = SAMPLE_FOLDER) -> tuple[Module, ...]:
    """Sections of the corpus of a pack folder; a damaged file or a section without words is a ``DataError``."""
    root = Path(path)
    try:
        lines = unxz(verified_bytes(root, CORPUS, read_manifest(root)), MOST_UNPACKED).decode("utf-8").splitlines()
        modules = tuple(Module(**json.loads(line)) for line in lines)
    except (lzma.LZMAError, ValueError, TypeError) as error:
        raise unreadable(root / CORPUS, error) from error
    for k, module in enumerate(modules):
        if not module.text.split():
            raise DataError(root / CORPUS, f"line {k + 1}", "text without words")
    return modules
