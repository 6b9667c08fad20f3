"""Specialisations of the attention kernels for the ahead-of-time gate: the launches that the launchers make for tensors
without memory, with the types and alignments that Triton would specialise on.
"""

import dataclasses
import itertools
from typing import Any

import torch

from astrobiogen.kernels.attention import triton_launch
from astrobiogen.kernels.attention.reference import Options
from astrobiogen.kernels.attention.samples import GATE_DIMS
from astrobiogen.kernels.attention.triton_launch import Launch, Machine
from astrobiogen.kernels.cases import CompileCase

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
TARGETS = (80, 86, 89, 90)
_WITH_DOTS = ("forward", "few", "grad_query", "grad_key")


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A training-size problem: 2,048 tokens, 32 query and 8 key/value heads, causal, all columns rotated."""

    dim: int
    dtype: torch.dtype = torch.bfloat16
    everything: bool = False  # window, packed sequences, soft cap and sinks together

    @property
    def label(self) -> str:
        extra = "/window,packed,softcap,sinks" if self.everything else ""
        return f"{self.dim}/{_TYPES[self.dtype]}{extra}"

    def tensors(self, tokens: int, heads: int) -> torch.Tensor:
        """[1, tokens, heads, dim] on the device without memory."""
        return torch.empty(1, tokens, heads, self.dim, dtype=self.dtype, device="meta")

    def options(self) -> Options:
        angles = torch.empty(2048, self.dim // 2, device="meta")
        if not self.everything:
            return Options(angles, angles, None, None, True, 0.125, 0, 0.0, False)
        bounds = torch.empty(9, dtype=torch.int32, device="meta")
        sinks = torch.empty(32, dtype=self.dtype, device="meta")
        return Options(angles, angles, bounds, sinks, True, 0.125, 1000, 30.0, False)


def cases() -> tuple[CompileCase, ...]:
    """Forward and both backward kernels at the gate's head dimensions in bf16; at 68 also fp16, all masks together, and
    the kernels that pack, merge and take few queries.
    """
    found: list[CompileCase] = []
    for target, dim in itertools.product(TARGETS, GATE_DIMS):
        found += _cases(_Shape(dim), target, ("forward", "grad_query", "grad_key"))
    for target in TARGETS:
        found += _cases(_Shape(68, everything=True), target, ("forward", "grad_query", "grad_key"))
        found += _cases(_Shape(68, torch.float16), target, ("forward",))
        found += _cases(_Shape(68), target, ("few", "pack", "row_constants", "combine"))
    return tuple(found)


def _cases(shape: _Shape, target: int, names: tuple[str, ...]) -> list[CompileCase]:
    launches = _launches(shape, target)
    return [_case(f"{name}/{shape.label}", launches[name], target, mma=name in _WITH_DOTS) for name in names]


def _launches(shape: _Shape, target: int) -> dict[str, Launch]:
    """The launches of a forward, a decode and a backward, by name; the first pack kernel is that of K, rotated."""
    collected: list[Launch] = []
    machine = Machine(target, 64, collected.append)
    q, k, v, token = (shape.tensors(*size) for size in ((2048, 32), (2048, 8), (2048, 8), (1, 32)))
    options, lse = shape.options(), torch.empty(1, 32, 2048, device="meta")
    p = triton_launch.make_problem(machine, q, k, options)
    rest = torch.empty_like(q, dtype=torch.int16)
    triton_launch.attend(p, v, q, lse, rest)
    triton_launch.differentiate(p, v, q, triton_launch.row_constants(p, q, q, lse, rest, None), (q, k, v))
    found: dict[str, Launch] = {}
    for launch in collected:
        found.setdefault(launch.kernel.__name__.removesuffix("_kernel"), launch)
    if not shape.everything:
        collected.clear()
        # A decoder keeps rotated keys.
        alone = triton_launch.make_problem(machine, token, k, options._replace(cos=None, sin=None))
        left = torch.empty_like(token, dtype=torch.int16)
        triton_launch.attend_few(alone, v, token, torch.empty(1, 32, 1, device="meta"), left)
        found |= {"few": collected[0], "combine": collected[1]}
    return found


def _case(name: str, launch: Launch, target: int, *, mma: bool) -> CompileCase:
    """What Triton's launcher would compile: an integer 1 becomes a constant, multiples of 16 are known as such."""
    names = [n for n in launch.kernel.arg_names if n not in launch.constants]
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {n: v for n, v in launch.constants.items() if n in launch.kernel.arg_names}
    aligned: list[str] = []
    for argument, value in zip(names, launch.arguments, strict=True):
        if isinstance(value, torch.Tensor):
            signature[argument] = f"*{_TYPES[value.dtype]}"
            aligned.append(argument)
        elif isinstance(value, float):
            signature[argument] = "fp32"
        elif value == 1:
            constants[argument] = 1
        else:
            signature[argument] = "i32"
            aligned += [argument] if value % 16 == 0 else []
    # 16-byte loads where rows are read 16 bytes at a time; rows of 68 columns in place start at multiples of 8 bytes.
    wide = mma and all(launch.constants.get(f"{n}_UNIT", 8) == 8 for n in "KV")
    return CompileCase(
        name, launch.kernel, signature, constants, tuple(aligned), launch.warps, launch.stages,
        needs_mma=mma, needs_vector_loads=wide, targets=(target,),
    )  # fmt: skip
