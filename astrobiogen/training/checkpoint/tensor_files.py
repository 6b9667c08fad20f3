"""Tensors as a safetensors file, written straight from their memory.

`safetensors.torch.save_file` copies every tensor, holds the interpreter's lock while it writes (a save in the
background would stop training all the same) and makes files that only their owner can read. The format is simple:
eight bytes of length, a JSON header, the bytes of the tensors one after the other.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

# Names of the format; what it has no name for cannot be saved.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED = 8
_PIECE = 1 << 24


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write and sync the new file `path`, with the mode that the umask gives; returns the SHA-256 of its bytes.

    Args:
        tensors: contiguous, on the CPU.

    Raises:
        OSError: the disk is full, read-only, ...
        TypeError: a dtype that safetensors has no name for.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    # Widest first, so that every tensor of a mapped file is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little") + text, *(_bytes(tensor) for _, tensor in ordered)):
            for place in range(0, len(piece), _PIECE):  # each piece is hashed while the cache still has it
                part = piece[place : place + _PIECE]
                file.write(part)
                digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of `tensor`."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
