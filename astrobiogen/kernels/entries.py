"""The short ways into the CPU kernels: C functions of `astrobiogen._C` that a public function tries before its checks.

One takes a call on plain CPU tensors that fit each other and returns the op's result; every other call (wrong
arguments, other devices, autocast, a transform of `torch.func`, a trace, a subclass) it leaves alone, by None.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def entry(name: str) -> Callable[..., Any]:
    """The short way into the public function `name`; without the extension one that takes no call."""
    if importlib.util.find_spec("astrobiogen._C") is None:
        return _takes_none
    return getattr(importlib.import_module("astrobiogen._C"), name)


def _takes_none(*arguments: Any) -> None:
    del arguments
