"""What an op demands of its tensors, checked before a Triton launcher reads them.

The public functions check what a user gives; `torch.ops.astrobiogen.*` can be called with anything, and a kernel on a
GPU that is told a wrong size reads and writes other tensors' memory. The C++ kernels check in csrc/*checks.h; this is
the same for the launchers: each op says once, beside its schema, what its tensors are.

An operand is ``name: kind axes``, operands are separated by semicolons, in any order of the schema's arguments:

    "x: float *rows H; weight: any H; rstd: exact *rows; grad: x *rows H"

The first one decides: its `kind` is "float" (float32, bfloat16, float16, float64). Of the others: "x", the first one's
name, is its dtype; "exact" its dtype or float32, whichever is wider; "any" one of the four; "double" float64; "int64";
"index" int32 or int64; "rest" int16 for a first one of half precision, else as "exact". An axis is a number, a name,
which stands for one size in all operands, or ``2I``, twice a name; ``*rows`` stands for any number of axes.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch

from astrobiogen.kernels.checks import FLOAT_DTYPES

_HALF = (torch.float16, torch.bfloat16)
_FIXED = {
    "float": FLOAT_DTYPES,
    "any": FLOAT_DTYPES,
    "double": (torch.float64,),
    "int64": (torch.int64,),
    "index": (torch.int32, torch.int64),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Operand:
    position: int
    name: str
    kind: str
    text: str  # the axes as they were written, for messages
    before: tuple[tuple[int, str], ...]  # (factor, name) of the axes before the star
    star: str  # empty: none
    after: tuple[tuple[int, str], ...]


def parse(schema: str, operands: str) -> tuple[_Operand, ...]:
    """The operands of an op with this schema.

    Raises:
        ValueError: an operand is no argument of the schema.
    """
    names = [one.split("=")[0].split()[-1] for one in schema.split("(", 1)[1].split(")")[0].split(", ")]
    found: list[_Operand] = []
    for operand in operands.split(";"):
        name, kind, *axes = operand.replace(":", " ").split()
        star = next((index for index, axis in enumerate(axes) if axis.startswith("*")), len(axes))
        pairs = [_axis(axis) for axis in axes if not axis.startswith("*")]
        place = names.index(name), name, kind, "[" + ", ".join(axes) + "]"
        found.append(_Operand(*place, tuple(pairs[:star]), "".join(axes[star : star + 1]), tuple(pairs[star:])))
    return tuple(found)


def check(op: str, operands: Sequence[_Operand], arguments: Sequence[Any]) -> None:
    """Hold the tensors among `arguments` against `operands`; an optional one that is None is skipped.

    Raises:
        TypeError: a dtype is another.
        ValueError: shapes do not fit, or the tensors are on several devices.
    """
    first = arguments[operands[0].position]
    device, sizes = first.device, {}
    for operand in operands:
        tensor = arguments[operand.position]
        if tensor is None:
            continue
        if tensor.dtype not in _dtypes(operand, operands[0].name, first.dtype):
            raise TypeError(f"{op}: {operand.name} must be {operand.kind}, got {tensor.dtype} ({__name__} explains it)")
        if tensor.device != device:
            raise ValueError(f"{op}: {operand.name} must be on {device}, got {tensor.device}")
        if not _fits(operand, tensor.shape, sizes):
            known = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise ValueError(
                f"{op}: {operand.name} must have shape {operand.text}, got {tuple(tensor.shape)} where {known}"
            )


def signature(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What the checks of a call depend on: dtype, shape and device of tensors, and all else as it is."""
    return tuple(
        [
            (value.shape, value.dtype, value.device)
            if isinstance(value, torch.Tensor)
            else signature(value)
            if isinstance(value, (list, tuple))
            else value
            for value in arguments
        ]
    )


def _axis(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d*)([A-Za-z]*)", text)
    if match is None:
        raise ValueError(f"no axis: {text!r}")
    return int(match[1] or 1), match[2]


def _dtypes(operand: _Operand, first_name: str, dtype: torch.dtype) -> Sequence[torch.dtype]:
    kind = operand.kind
    if kind == first_name:
        return (dtype,)
    if kind == "rest" and dtype in _HALF:
        return (torch.int16,)
    if kind in ("exact", "rest"):
        return (torch.float64 if dtype == torch.float64 else torch.float32,)
    return _FIXED[kind]


def _fits(operand: _Operand, shape: Sequence[int], sizes: dict[str, Any]) -> bool:
    before, after = len(operand.before), len(operand.after)
    rank = len(shape)
    if rank < before + after if operand.star else rank != before + after:
        return False
    if operand.star and sizes.setdefault(operand.star, middle := tuple(shape[before : rank - after])) != middle:
        return False
    for (factor, name), size in (*zip(operand.before, shape), *zip(operand.after, shape[rank - after :])):
        if not name:
            if size != factor:
                return False
        elif size % factor or sizes.setdefault(name, size // factor) != size // factor:
            return False
    return True
