"""Description of an op's inputs, shared by its test, its benchmark and its ahead-of-time compile gate."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class TensorMaker:
    """Draws a case's tensors: fresh standard-normal values, one dtype and device, from one seeded generator."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard-normal tensor `shape`; drawn in fp64 and rounded, so that every dtype of a case sees the same
        numbers."""
        values = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return values.to(dtype=dtype or self.dtype, device=self.device)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 tensor `shape` with values in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclasses.dataclass(frozen=True)
class Case:
    """One named input of an op.

    Attributes:
        name: shows up in test ids.
        build: returns the public function's arguments by name. It may return non-contiguous, expanded or empty tensors:
            the battery
            keeps strides as they are.
        differentiable: names of the arguments whose gradients are checked; empty for none.
        gradcheck: small enough (< ~200 elements in all) for a numerical fp64 gradient check.
        interpret: small enough (< ~5,000 elements in all) for Triton's interpreter, which runs programs one by one in
            Python.
        masks: some rows are hidden from some results, and no softmax has a single member, so that a probe with other
            finite numbers finds all that may be heard; the visibility check then asks the reference too.
    """

    name: str
    build: Callable[[TensorMaker], dict[str, Any]]
    differentiable: tuple[str, ...]
    gradcheck: bool = False
    interpret: bool = True
    masks: bool = False


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One kernel specialisation that the ahead-of-time gate compiles and inspects without a GPU.

    Attributes:
        name: row name in the table, e.g. ``"forward/4352/fp16"``.
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type (``"*fp16"``, ``"i64"``, ``"fp32"``), constexpr arguments left out.
        constexprs: argument name -> compile-time value.
        aligned: names of the pointer and integer arguments that are divisible by 16, as the launcher guarantees at this
            size.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        needs_mma: True for a kernel with a dot, which must use tensor cores.
        needs_vector_loads: True where alignment allows 16-byte global loads.
        targets: compute capabilities this specialisation is meant for.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    needs_mma: bool = False
    needs_vector_loads: bool = True
    targets: tuple[int, ...] = (80, 86, 89, 90)
