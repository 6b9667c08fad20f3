"""What the Triton kernels of several operators share: widening, the device, the launch."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver


@triton.jit
def wide(value):
    """fp32, or fp64 as it is: the type in which kernels compute."""
    if value.dtype == tl.float64:
        return value
    return value.to(tl.float32)


MAX_GRID = 65_535  # of the second and third axis of a grid; the first takes 2^31 - 1
INTERPRETER = 0  # the capability of Triton's interpreter
INTERPRETED_MULTIPROCESSORS = 2  # two, so that work that is split is split there too


def capability(device: torch.device) -> int:
    """Compute capability for which a launch on `device` compiles, e.g. 86; `INTERPRETER` under Triton's interpreter.

    CPU tensors reach a launch under the interpreter, or where a driver stands in for a GPU's (`astrobiogen.testing`).
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if knobs.runtime.interpret:
        return INTERPRETER
    target: Any = driver.active.get_current_target()
    return int(target.arch)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device that `capability` describes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if knobs.runtime.interpret:
        return INTERPRETED_MULTIPROCESSORS
    active: Any = driver.active
    return active.utils.get_device_properties(0)["multiprocessor_count"]


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """``kernel[grid]``, run on the device of its first tensor.

    Triton launches on the current device, whatever the tensors': with tensors of a second GPU an unguarded launch reads
    addresses of the first. CPU tensors (Triton's interpreter) need no guard.

    Raises:
        ValueError: a second or third axis of the grid is longer than CUDA's 65,535.
    """
    if any(size > MAX_GRID for size in grid[1:]):
        raise ValueError(
            f"the launch grid's second and third axis may be at most {MAX_GRID}, got {grid}: too many rows"
        )

    def run(*arguments: Any, **options: Any) -> None:
        tensor = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):
            kernel[grid](*arguments, **options)

    return run
