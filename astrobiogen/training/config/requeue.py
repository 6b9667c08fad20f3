"""`--resume auto`: the same command starts a run and, started again by a scheduler, goes on with it."""

import dataclasses
from pathlib import Path

from astrobiogen.training.config import run_config
from astrobiogen.training.config.as_dict import changed_on_resume, to_dict
from astrobiogen.training.config.schema import TrainConfig
from astrobiogen.training.errors import UserError

AUTO = "auto"


def agreed(wanted: TrainConfig, folder: Path) -> TrainConfig:
    """What the command line asks for, as far as the run in `folder` allows it: its number format was chosen when it
    began.

    Raises:
        UserError: the command line asks for another run than the one in `folder`.
    """
    saved = run_config.read(folder)
    if wanted.precision.dtype == "auto":
        chosen = dataclasses.replace(wanted.precision, dtype=saved.precision.dtype)
        wanted = dataclasses.replace(wanted, precision=chosen)
    changed = changed_on_resume(to_dict(saved), to_dict(wanted))
    if changed:
        text = "; ".join(f"{key}: the run has {had!r}, asked for {got!r}" for key, (had, got) in changed.items())
        raise UserError(f"--resume auto: {folder} holds a run of another configuration; name another --output: {text}")
    return wanted
