"""config.yaml of a run folder."""

from pathlib import Path

import yaml

from astrobiogen.training.config import run_folder, yaml_file
from astrobiogen.training.config.as_dict import to_dict
from astrobiogen.training.config.parser import from_dict
from astrobiogen.training.config.schema import TrainConfig
from astrobiogen.training.errors import UserError


def write(folder: Path, config: TrainConfig) -> None:
    """Write it.

    Raises:
        OSError: the disk is full, ...
    """
    run_folder.write_text(folder / run_folder.CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))


def read(folder: Path) -> TrainConfig:
    """What `write` has written there, or someone has made of it.

    Raises:
        UserError: not readable, or no configuration.
    """
    path = folder / run_folder.CONFIG
    try:
        value = yaml_file.load(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{path}: got {type(value).__name__}, expected keys and values")
        return from_dict(value)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
