"""What the Triton kernels of several operators share."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wide(value):
    """fp32, or fp64 as it is: the type in which kernels compute."""
    if value.dtype == tl.float64:
        return value
    return value.to(tl.float32)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, run on the device of its first tensor.

    Triton launches on the current device, whatever the tensors': with tensors of a second GPU an unguarded launch reads
    addresses of the first. CPU tensors (Triton's interpreter) need no guard.
    """

    def run(*arguments: Any, **options: Any) -> None:
        tensor = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):
            kernel[grid](*arguments, **options)

    return run
