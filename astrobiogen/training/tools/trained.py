"""A trained model, from the folder of its run or of one checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

from astrobiogen import data, models
from astrobiogen.training import checkpoint
from astrobiogen.training.batches import assemble
from astrobiogen.training.checkpoint import chosen, saving
from astrobiogen.training.config import TrainConfig, run_folder
from astrobiogen.training.config.parser import from_dict
from astrobiogen.training.errors import CheckpointError, UserError


@dataclasses.dataclass(frozen=True)
class Trained:
    """A verified checkpoint with the configuration of its run.

    Attributes:
        taken: which checkpoint it is, and why that one.
        content: its tensors and documents.
        config: of the run.
    """

    taken: chosen.Chosen
    content: checkpoint.Content
    config: TrainConfig

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.taken.path

    @property
    def statistics(self) -> Any:
        """Means, deviations and tokenizer of the data it was trained on (`DatasetBundle.statistics`); None in
        checkpoints that do not hold them."""
        return self.content.documents.get("data") or None

    def model(self, spec: data.DataSpec) -> models.UnifiedMultiModalSystem:
        """A model of its own with the weights of the checkpoint; the averaged ones, if it has any."""
        model, _ = assemble.build_model(self.config, spec)
        saving.load_weights(model, self.path, chosen.averaged(self.content))
        return model


def find(source: Path) -> Trained:
    """The checkpoint meant by `source`, a run's folder (its best model is taken) or a checkpoint's, verified and read.

    Raises:
        UserError: no such folder, or a configuration of another version.
        CheckpointError: no whole checkpoint, or one without weights or configuration.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected the folder of a run or of a checkpoint")
    if (source / checkpoint.MANIFEST).exists():
        content = checkpoint.read(source)
        stored = _stored_config(source, content)
        return Trained(chosen.described(source, content), content, _config(source, stored))
    run_folder.find(str(source))
    stores = [
        checkpoint.CheckpointStore(source / name, keep=2, writable=False)
        for name in ("best", "checkpoints")
        if (source / name).is_dir()
    ]
    if not any(store.candidates() for store in stores):
        raise CheckpointError(f"{source}: the run has no checkpoint yet")
    taken, content = chosen.choose(stores[0], stores[-1])
    return Trained(taken, content, _config(taken.path, _stored_config(taken.path, content)))


def _stored_config(path: Path, content: checkpoint.Content) -> Any:
    """The configuration in a checkpoint, which must also hold weights; CheckpointError says which of them it lacks."""
    documents = content.documents
    stored: Any = documents.get("best", documents.get("training", {})).get("config")
    if stored is None or "model" not in content.tensors:
        raise CheckpointError(f"{path}: holds no {'configuration' if stored is None else 'weights'}")
    return stored


def _config(path: Path, stored: Any) -> TrainConfig:
    try:
        return from_dict(stored)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its configuration does not fit this version: {error}") from error
