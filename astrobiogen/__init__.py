"""Custom Triton and C++ kernels for PyTorch, and the multi-modal astrobiology model that is built on them."""

from astrobiogen import _extension as _extension
from astrobiogen import ops as ops
from astrobiogen.integrations import swap_layers as swap_layers
from astrobiogen.kernels._registry import kernel_status as kernel_status
from astrobiogen.kernels._registry import use_kernels as use_kernels

__version__ = "0.1.0"
