"""Sharded tensors on disk, through `torch.distributed.checkpoint` (DCP): each process writes its shards, any number of
processes reads them.

A folder of `shard-<process>-*.safetensors` whose headers say where each piece lies in its tensor, and `aliases.json`
with the names of tensors that are the very same memory. DCP's usual format keeps a pickle beside the data; this one,
which it shares with Hugging Face, does not. DCP checks no content: that is the manifest's business.
"""

import errno
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from astrobiogen.training.distributed import World, local_part

_ALIASES = "aliases.json"
Reference = Callable[[str], torch.Tensor | None]


def is_sharded(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of `tensors` is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def own_files(folder: Path, rank: int) -> list[Path]:
    """Files that process `rank` has written into `folder`."""
    shards = sorted(folder.glob(f"shard-{rank + 1:05d}-*"))
    return [*shards, folder / _ALIASES] if rank == 0 else shards


def write(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Store `tensors` in the existing `folder`; every process must call it.

    Raises:
        OSError: some process could not write; raised in all of them.
    """
    # As process 0 sees it: it has a part of every tensor, others may hold empty shards, which have no address.
    aliases: dict[str, str] = world.broadcast(_aliases(tensors))
    stored = {name: tensor.detach() for name, tensor in tensors.items() if name not in aliases}
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(stored, storage_writer=writer, process_group=world.control)
    except CheckpointException as error:  # DCP raises it in every process if one fails
        causes = [failure[0] for failure in error.failures.values()]
        text = " ".join(str(causes[0] if causes else error).split())[:300]
        raise OSError(getattr(causes[0] if causes else None, "errno", None) or errno.EIO, text) from error
    if world.main:
        (folder / _ALIASES).write_text(json.dumps(aliases))


def _aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names whose tensor is the memory of an earlier name (tied weights) -> that name."""
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        part = local_part(tensor)
        place = (part.device, part.data_ptr(), tuple(tensor.shape), part.stride(), part.dtype)
        if part.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
    return aliases


def read(folder: Path, reference: Reference) -> dict[str, torch.Tensor]:
    """The tensors of `folder`, on the CPU.

    Args:
        reference: name -> a tensor as which it will be used. Where that is a shard of the same shape, only this
            process's shard of it is read; otherwise the whole tensor.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    targets: dict[str, torch.Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        wanted, dtype = reference(name), entry.properties.dtype
        if isinstance(wanted, DTensor) and wanted.shape == entry.size:
            targets[name] = torch.zeros_like(wanted, dtype=dtype)
        else:
            targets[name] = torch.empty(entry.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # reading needs no exchange
        dcp.load(targets, storage_reader=reader, no_dist=True)
    aliases: dict[str, str] = json.loads((folder / _ALIASES).read_text())
    return targets | {name: targets[other] for name, other in aliases.items()}
