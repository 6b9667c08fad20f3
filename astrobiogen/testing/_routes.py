"""Sends the library's ops to the implementation under test."""

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from astrobiogen.kernels import registry

Implementation = Literal["default", "cpu", "triton", "sm_80", "sm_86", "sm_89"]
EMULATED = ("sm_80", "sm_86", "sm_89")


def device_of(implementation: Implementation, device: str | torch.device) -> torch.device:
    """Where the check runs: Triton kernels on the GPU if there is one, else on CPU tensors under Triton's
    interpreter; compiled code is emulated on CPU tensors.
    """
    if implementation in EMULATED:
        return torch.device("cpu")
    if implementation == "triton":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextlib.contextmanager
def route(ops: Sequence[str], implementation: Implementation) -> Iterator[list[str]]:
    """Serve `ops` by `implementation` inside the block; the previous kernels come back after it.

    Args:
        ops: op names without the namespace.
        implementation: ``"default"`` leaves everything alone; the others keep public functions from calling PyTorch's
            in place of an op. ``"cpu"`` demands that the C++ extension has a kernel for every op; ``"triton"`` puts the
            Triton launchers on the CPU key, to run under the interpreter, unless a CUDA device exists; ``"sm_86"`` and
            its like do so to run the compiled kernels on the emulator of `astrobiogen.testing.ptx`.

    Yields:
        The names of the ops that reached a Triton launcher through this route, in order (stays empty for the others).

    Raises:
        AssertionError: a kernel that should be tested does not exist, or the emulator has found a race or the like.
        RuntimeError: the Triton route without a GPU needs ``TRITON_INTERPRET=1`` before Triton's first import.
    """
    calls: list[str] = []
    missing = [name for name in ops if name not in registry.ops()]
    if missing:
        raise AssertionError(f"no such op: {missing}; registered are {registry.ops()}")
    if implementation == "cpu":
        absent = [name for name in ops if not registry.has_kernel(name, "CPU")]
        if absent:
            raise AssertionError(
                f"no C++ kernel for {absent}: build the extension with `python setup.py build_ext --inplace`"
            )
    if implementation in EMULATED:
        launching = importlib.import_module("astrobiogen.testing.ptx.launch")  # Triton is not on every machine
        arch = int(implementation.removeprefix("sm_"))
        with launching.emulated_launches(arch) as emulator, registry.only_ops(), _on_cpu(ops, calls):
            yield calls
        findings = [f"{run.kernel} {run.grid}: {finding}" for run in emulator.runs for finding in run.findings]
        assert not findings, "\n".join(findings)
        return
    if implementation == "default":
        yield calls
        return
    if implementation != "triton" or torch.cuda.is_available():
        with registry.only_ops():
            yield calls
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "without a CUDA device the Triton route needs TRITON_INTERPRET=1 in the environment before Triton's import"
        )
    with registry.only_ops(), _on_cpu(ops, calls):
        yield calls


@contextlib.contextmanager
def _on_cpu(ops: Sequence[str], calls: list[str]) -> Iterator[None]:
    """Put the ops' Triton launchers on the CPU key inside the block; they add their names to `calls`."""
    library = torch.library.Library(registry.NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            # Overriding the C++ kernel is the purpose here; PyTorch warns about it once per process.
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name in ops:
                library.impl(name, _counting(name, calls), "CPU", allow_override=True)
        # The interpreter computes in NumPy, which warns where a GPU is silent: of infinities, and of leftovers in lanes
        # that the kernel then masks (signalling NaN bits among them, so only on some runs).
        with np.errstate(all="ignore"):
            yield
    finally:
        library._destroy()


def _counting(name: str, calls: list[str]) -> Callable[..., Any]:
    if not registry.triton_launcher(name):
        raise AssertionError(f"op {name} has no Triton launcher")
    launcher = registry.launcher(name)

    def launch(*args: Any) -> Any:
        calls.append(name)
        return launcher(*args)

    return launch
