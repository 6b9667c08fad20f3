"""Custom Triton and C++ kernels for PyTorch, and the multi-modal astrobiology model that is built on them.

Importing it loads torch and the operators; the parts that need more are loaded when they are first asked for.
"""

import importlib
import typing

from astrobiogen import extension as extension
from astrobiogen import ops
from astrobiogen.integrations import swap_layers
from astrobiogen.kernels.registry import kernel_status, use_kernels

if typing.TYPE_CHECKING:
    from astrobiogen import data, layers, models
    from astrobiogen.predict import load_model

__version__ = "0.1.0"

__all__ = [
    "data",
    "kernel_status",
    "layers",
    "load_model",
    "models",
    "ops",
    "swap_layers",
    "use_kernels",
]

_LATER = ("data", "layers", "models")


def __getattr__(name: str) -> typing.Any:
    """A subpackage, or `load_model`, that is loaded on first use."""
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "load_model":
        return importlib.import_module(f"{__name__}.predict").load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
