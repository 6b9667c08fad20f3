"""What each process of a run has of its own in a checkpoint, and how it is put back in as many or other processes.

Everything else in a checkpoint belongs to the run as a whole. A process's own are its random generators and, in the
middle of an update, its sums of losses and (under DDP) its gradients, which only the closing round would average; and
the moments of an 8-bit optimizer on shards, whose blocks begin where the shard begins.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from astrobiogen.training.checkpoint import packing
from astrobiogen.training.checkpoint.store import PROCESS, Content
from astrobiogen.training.distributed import World, runtime
from astrobiogen.training.distributed.model import like
from astrobiogen.training.optim.local_shards import LocalShardOptimizer, restore
from astrobiogen.training.update import Updater

_LOG = logging.getLogger("astrobiogen")
# Between the seeds of two processes; a prime, so that neighbouring runs (seed + 1) do not share streams.
_SEED_STEP = 1_000_003
_MOMENT = re.compile(r"\.optimizer\.state\.(\d+)\.")


def seed_process(seed: int, world: World) -> None:
    """Give every process but the first random streams of its own (dropout), after all have drawn the same weights."""
    if world.rank:
        runtime.seed_everything(seed + _SEED_STEP * world.rank)


def own_part(updater: Updater) -> dict[str, Any]:
    """State of this process, packable."""
    parallel, optimizer = updater.parallel, updater.optimizer
    return {
        "rng": runtime.rng_state(),
        "sums": updater.window.sums,
        "gradients": gradients(updater.model) if parallel.local_gradients and updater.window.batches else {},
        "moments": optimizer.shard_states() if isinstance(optimizer, LocalShardOptimizer) else {},
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The present gradients by name."""
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def saved_parts(content: Content) -> list[dict[str, Any]]:
    """`own_part` of each process that has saved, by rank; none if that was a single process."""
    names = sorted(name for name in content.documents if name.startswith(PROCESS))
    ordered = sorted(names, key=lambda name: int(name.removeprefix(PROCESS)))
    return [packing.unpack(content.documents[name], content.tensors[name]) for name in ordered]


def put_back(updater: Updater, content: Content, rng: dict[str, Any], seed: int, step: int) -> None:
    """Restore what `own_part` and `gradients` hold, after the state of the run as a whole.

    Args:
        rng: generators of the first process.
        seed, step: for the generators of processes that the saved run did not have.
    """
    world, parts = updater.parallel.world, saved_parts(content)
    _put_back_gradients(updater, content, parts)
    if parts:
        _put_back_sums(updater, parts)
        _put_back_moments(updater, parts)
    elif not world.main:
        updater.window.sums = None
    if world.rank < max(len(parts), 1):
        runtime.set_rng_state(parts[world.rank]["rng"] if parts else rng)
    else:
        seed_process(seed + step, world)
    if len(parts or [0]) != world.size:
        counts = (len(parts or [0]), world.size)
        _LOG.warning("saved by %d process(es), resumed by %d: the same training up to rounding and dropout", *counts)


def _put_back_gradients(updater: Updater, content: Content, parts: Sequence[Mapping[str, Any]]) -> None:
    world, saved = updater.parallel.world, content.tensors.get("gradients", {})
    for name, parameter in updater.model.named_parameters():
        gradient = saved.get(name)
        locals_ = [part["gradients"][name] for part in parts if name in part["gradients"]]
        if locals_ and len(parts) == world.size and updater.parallel.local_gradients:
            gradient = parts[world.rank]["gradients"].get(name)
        elif locals_:
            # The closing round averages over processes, so each may as well hold the average of what there is.
            gradient = torch.stack(locals_).sum(0) / len(parts)
        parameter.grad = None if gradient is None else like(parameter, gradient.to(copy=True, device=gradient.device))


def _put_back_sums(updater: Updater, parts: Sequence[Mapping[str, Any]]) -> None:
    world, window = updater.parallel.world, updater.window
    own = parts[world.rank]["sums"] if world.rank < len(parts) else None
    for part in parts[world.size :] if world.main else ():  # of processes that are no more
        own = part["sums"] if own is None else own + part["sums"]
    place = window.sums.device if window.sums is not None else torch.device("cpu")
    window.sums = None if own is None else own.to(place)


def _put_back_moments(updater: Updater, parts: Sequence[Mapping[str, Any]]) -> None:
    saved = [part["moments"] for part in parts]
    optimizer = updater.optimizer
    if not any(saved):
        return
    if isinstance(optimizer, LocalShardOptimizer):
        optimizer.restore(saved)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    restore(optimizer, [(number, one, one) for number, one in enumerate(parameters)], saved)


class References:
    """Finds for each tensor of a checkpoint the one that it will replace: `CheckpointStore.load_newest` then reads only
    the part of it that this process holds.
    """

    def __init__(self, updater: Updater) -> None:
        model = updater.model
        self._named: dict[str, torch.Tensor] = {**model.state_dict(), **dict(model.named_parameters())}
        self._numbered = [one for group in updater.optimizer.param_groups for one in group["params"]]

    def __call__(self, stem: str, name: str) -> torch.Tensor | None:
        """The tensor that `name` in the file `stem` will replace, or one sharded alike."""
        if stem in ("model", "average", "gradients"):
            return self._named.get(name)
        match = _MOMENT.search(name) if stem == "training" else None
        return self._numbered[int(match[1])] if match and int(match[1]) < len(self._numbered) else None

    def placed(self, content: Content) -> Content:
        """`content` with every whole tensor whose replacement is sharded cut to this process's shard."""

        def place(stem: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
            reference = self(stem, name)
            fits = reference is not None and type(tensor) is torch.Tensor and reference.shape == tensor.shape
            return like(reference, tensor) if fits and reference is not None else tensor

        tensors = {
            stem: {name: place(stem, name, tensor) for name, tensor in named.items()}
            for stem, named in content.tensors.items()
        }
        return dataclasses.replace(content, tensors=tensors)
