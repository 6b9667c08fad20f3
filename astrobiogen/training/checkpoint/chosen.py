"""Which stored weights the closing examination is of: the best ones, else the newest whole checkpoint's."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from astrobiogen.training.checkpoint.store import CheckpointStore, Content, Reference
from astrobiogen.training.errors import CheckpointError, UserError

_LOG = logging.getLogger("astrobiogen")
BEST, OTHER = "best", "checkpoint"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Weights on disk.

    Attributes:
        path: their checkpoint.
        kind: `BEST` or `OTHER`.
        epoch: how many epochs of training they have seen, an unfinished one counted.
        reason: why they stand in for the best ones; empty if they do not.
    """

    path: Path
    kind: str
    epoch: int
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """For metrics.json and the report."""
        facts = {"kind": self.kind, "checkpoint": self.path.name, "epoch": self.epoch}
        return facts | ({"reason": self.reason} if self.reason else {})

    def __str__(self) -> str:
        name = "the best model" if self.kind == BEST else "the newest whole checkpoint"
        return f"{name}, {self.path} (epoch {self.epoch})"


def described(path: Path, content: Content, reason: str = "") -> Chosen:
    """What the checkpoint `path` itself says of its weights.

    Raises:
        CheckpointError: it says nothing.
    """
    documents: Any = content.documents
    try:
        if "best" in documents:
            return Chosen(path, BEST, documents["best"]["epoch"] + 1)
        progress = documents["training"]["progress"]
        done = progress["epoch"] + (progress["batch"] > 0 or progress["validating"])
        return Chosen(path, OTHER, done, reason)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not say how far its weights are trained: no {error}") from error


def averaged(content: Content) -> Any:
    """The weights in `content` that are validated and tested: the averaged ones, if it has any."""
    return content.tensors.get("average", content.tensors["model"])


def choose(
    best: CheckpointStore, store: CheckpointStore, reference: Reference = lambda _stem, _name: None
) -> tuple[Chosen, Content]:
    """The best weights; where there are none, or none whole, the newest whole checkpoint, which is said. Every process
    must call it.

    Args:
        reference: see `CheckpointStore.load_newest`.

    Raises:
        CheckpointError: there is no whole checkpoint of either kind.
    """
    reason = f"{best.root} holds no checkpoint"
    try:
        found = best.load_newest(reference)
    except UserError as error:  # in process 0 a CheckpointError, in the others what they are told of it
        found, reason = None, str(error)
    if found is not None:
        return described(*found), found[1]
    newest = store.load_newest(reference)
    if newest is None:
        raise CheckpointError(f"{reason}, and neither does {store.root}")
    chosen = described(*newest, reason)
    _LOG.warning("%s; taken instead: %s", reason, chosen)
    return chosen, newest[1]
