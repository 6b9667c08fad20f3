"""What the Triton kernels of several operators share."""

import triton
import triton.language as tl


@triton.jit
def wide(value):
    """fp32, or fp64 as it is: the type in which kernels compute."""
    if value.dtype == tl.float64:
        return value
    return value.to(tl.float32)
