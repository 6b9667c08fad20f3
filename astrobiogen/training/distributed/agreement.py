"""Whether the processes of a run are about to do the same: compared before anything is made or trained."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import astrobiogen
from astrobiogen.training.config import TrainConfig, resume_rules
from astrobiogen.training.config.as_dict import flatten, to_dict
from astrobiogen.training.distributed.world import World
from astrobiogen.training.errors import UserError

_NAMED = 6


@functools.cache
def code_version() -> str:
    """A digest of the package's sources, and PyTorch's version."""
    root = Path(astrobiogen.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"astrobiogen {digest.hexdigest()[:12]}, torch {torch.__version__}"


def of_run(config: TrainConfig, resume: bool) -> dict[str, Any]:
    """What processes that start a run must have alike: the configuration but for `resume_rules.OF_A_PROCESS`, whether
    it is resumed, and the code.
    """
    keys = {key: value for key, value in flatten(to_dict(config)).items() if key not in resume_rules.OF_A_PROCESS}
    return keys | {"--resume": resume, "code": code_version()}


def require(world: World, facts: Mapping[str, Any]) -> None:
    """Compare `facts` over all processes; every process must call it, and gets the same error if they differ.

    Raises:
        UserError: what differs, by name, with the value of each process.
    """
    if not world.distributed:
        return
    everyone: list[Mapping[str, Any]] = world.gather(dict(facts))
    names = sorted({name for one in everyone for name in one})
    unlike = [name for name in names if any(_of(one, name) != _of(everyone[0], name) for one in everyone)]
    if unlike:
        told = "; ".join(f"{name}: {_values([_of(one, name) for one in everyone])}" for name in unlike[:_NAMED])
        more = f"; and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
        raise UserError(f"the processes of a run must agree, but they differ in {told}{more}")


def _of(facts: Mapping[str, Any], name: str) -> str:
    return repr(facts[name]) if name in facts else "nothing"


def _values(values: Sequence[str]) -> str:
    """`0 in process 0, 1 in processes 1, 2, 3`; of many processes the first few."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} in {_named(found)}" for value, found in ranks.items())


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_NAMED]) + (", ..." if len(ranks) > _NAMED else "")
    return f"process{'es' if len(ranks) > 1 else ''} {shown}"
