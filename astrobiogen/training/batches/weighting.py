"""What each micro-batch counts in its update, term by term of the loss, and which texts the update reads."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from astrobiogen.training.batches import loading
from astrobiogen.training.distributed.share import Round

# (sample numbers, those of them whose text is read; None: all) -> how many things each term is a mean over.
Counts = Callable[[Sequence[int], frozenset[int] | None], dict[str, float]]
# Keeps the stream of `TextShare` apart from others that are seeded alike.
_STREAM = 0x7E47
_TEXT = 3  # column of the text in `modality_mask`


def emphasis(part: dict[str, float], size: int, window: dict[str, float], samples: int) -> dict[str, float]:
    """Factors e[k] that make a window's loss the one of its full batch, for terms that are not means over samples.

    Term k is a mean over part[k] things (tokens, samples that have a graph) in a micro-batch b of n_b samples, and
    `Updater` weighs micro-batches by n_b of the N samples of the window: sum_b n_b / N * e_b[k] * mean_b =
    sum_b count_b[k] * mean_b / sum_b count_b[k] for e_b[k] = (count_b[k] / n_b) / (sum_b count_b[k] / N).

    Args:
        part, size: counts and number of samples of the micro-batch.
        window, samples: of the whole window.
    """
    return {name: part[name] / size / (window[name] / samples) if window[name] else 1.0 for name in part}


class TextShare:
    """Draws, for each update, the samples whose text is read: a function of the seed, the epoch and the samples.

    Drawn for the update as a whole, so that neither the division into micro-batches nor the number of processes
    changes what is trained on, and with no generator that a checkpoint would have to hold.

    Args:
        share: of an update's samples, rounded, at least one.
    """

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._seed = seed

    def __call__(self, epoch: int, window: tuple[int, ...]) -> frozenset[int] | None:
        """Sample numbers whose text is read in the update on `window`; None: all."""
        count = max(1, round(self._share * len(window)))
        if count >= len(window):
            return None
        places = np.random.default_rng((_STREAM, self._seed, epoch, *window)).permutation(len(window))
        return frozenset(window[place] for place in places[:count])


def reading(batch: loading.Batch, indices: Sequence[int], read: frozenset[int]) -> loading.Batch:
    """`batch`, the samples `indices`, told to read the texts of `read` only.

    Where it has none of them, one text is run all the same and counts as absent: under FSDP2 all processes must run
    the same parts of the model, and under DDP the loss then depends on every parameter.
    """
    places = [place for place, index in enumerate(indices) if index in read]
    device = batch["modality_mask"].device
    chosen = {"text_rows": torch.tensor(places or [0]).to(device, non_blocking=True)}
    if not places:
        present = batch["modality_mask"].clone()
        present[:, _TEXT] = False
        chosen["modality_mask"] = present
    return batch | chosen


class Weighting:
    """The batch and its factors for each round, with what belongs to a whole window computed once.

    Args:
        counts: see `Task.counts`; None: every term is a mean over all samples.
        text_share: share of the texts that an update reads.
    """

    def __init__(self, counts: Counts | None, text_share: float, seed: int) -> None:
        self._counts = counts
        self._share = TextShare(text_share, seed)
        self._key: tuple[int, tuple[int, ...]] = (-1, ())
        self._read: frozenset[int] | None = None
        self._totals: dict[str, float] = {}

    def __call__(
        self, epoch: int, shared: Round, indices: Sequence[int], batch: loading.Batch
    ) -> tuple[loading.Batch, dict[str, float] | None]:
        """`batch`, this process's share `indices` of a round, as it is to be run, and its factors; None where they are
        all 1.
        """
        window = shared.window
        if self._key != (epoch, window):
            self._key, self._read = (epoch, window), self._share(epoch, window)
            self._totals = self._counts(window, self._read) if self._counts is not None else {}
        if self._read is not None:
            batch = reading(batch, indices, self._read)
        if self._counts is None or len(indices) == len(window):
            return batch, None
        return batch, emphasis(self._counts(indices, self._read), len(indices), self._totals, len(window))
