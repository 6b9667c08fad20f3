"""Sending Triton's launches to the emulator.

Of Triton this uses `triton.jit` functions through their `run` method (with `warmup=True` it compiles and does not
launch, as the documented `JITFunction.warmup`), what a compiled kernel says of itself (`asm`, `metadata.shared`,
`src.signature`), and `triton.runtime.driver.set_active`. The last, `run` and `src` are not in Triton's public
documentation; versions 3.6 and 3.7 have them.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from astrobiogen.testing.ptx.machine.execution import run_grid
from astrobiogen.testing.ptx.machine.findings import Findings, KernelError, KernelRun
from astrobiogen.testing.ptx.machine.program import Program, parse

ARCHITECTURES = (80, 86, 89)
MULTIPROCESSORS = 2  # few, so that grids that fill the device have little to do


class _Utilities:
    """What Triton asks about the device."""

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": 2**20, "multiprocessor_count": self._multiprocessors, "warpSize": 32}


class HostDriver:
    """Stands in for Triton's CUDA driver: a device of compute capability `arch` whose tensors are CPU tensors."""

    def __init__(self, arch: int, multiprocessors: int = MULTIPROCESSORS) -> None:
        self.utils = _Utilities(multiprocessors)
        self._arch = arch

    def get_current_device(self) -> int:
        """Always the first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Always the first."""
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self._arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors lie."""
        return torch.device("cpu")


@contextlib.contextmanager
def host_driver(arch: int, multiprocessors: int = MULTIPROCESSORS) -> Iterator[HostDriver]:
    """Make a `HostDriver` Triton's driver inside the block."""
    stand_in = HostDriver(arch, multiprocessors)
    driver.set_active(stand_in)  # type: ignore[arg-type]
    try:
        yield stand_in
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to come back to
            driver.reset_active()


class Emulator:
    """Runs launches; `runs` lists them.

    `edit`: applied to the PTX of every kernel, e.g. to plant a fault.
    """

    def __init__(self, edit: Callable[[str], str] | None = None) -> None:
        self.runs: list[KernelRun] = []
        self._edit = edit
        self._programs: dict[str, Program] = {}

    def launch(self, compiled: Any, grid: tuple[int, int, int], bound: dict[str, Any]) -> None:
        """Run one compiled kernel on the arguments `bound` by name.

        Raises:
            KernelError: the kernel did what would end it on a GPU. The launch is in `runs` all the same.
        """
        if 0 in grid:
            return
        ptx = compiled.asm["ptx"]
        program = self._programs.get(ptx)
        if program is None:
            program = self._programs[ptx] = parse(self._edit(ptx) if self._edit else ptx)
        names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        findings, done, fault = Findings(), 0, ""
        try:
            values = [bound[name] for name in names]
            done = run_grid(program, compiled.metadata.shared, grid, values, names, findings)
        except KernelError as error:
            fault = str(error)
            raise
        finally:
            self.runs.append(KernelRun(compiled.name, grid, done, findings.all(), fault))


@contextlib.contextmanager
def emulated_launches(
    arch: int = 86, *, multiprocessors: int = MULTIPROCESSORS, edit: Callable[[str], str] | None = None
) -> Iterator[Emulator]:
    """Inside the block every launch of a `triton.jit` kernel on CPU tensors is compiled for `arch` and emulated.

    Args:
        arch: 80, 86 or 89.
        multiprocessors: that the device seems to have.
        edit: applied to the PTX of every kernel.

    Raises:
        ValueError: another `arch`.
        RuntimeError: Triton's interpreter is on, for which kernels are not compiled.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch!r}")
    if knobs.runtime.interpret:
        raise RuntimeError("emulation compiles kernels: unset TRITON_INTERPRET before Triton is imported")
    emulator, original = Emulator(edit), JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(kernel, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            named = {name: value for name, value in options.items() if name in kernel.signature.parameters}
            bound = _bind(kernel.signature, arguments, named)
            emulator.launch(compiled, _grid(grid, bound), bound)
        return compiled

    with host_driver(arch, multiprocessors):
        JITFunction.run = run  # type: ignore[method-assign]
        try:
            yield emulator
        finally:
            JITFunction.run = original  # type: ignore[method-assign]


def _bind(signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*arguments, **named)
    bound.apply_defaults()
    return dict(bound.arguments)


def _grid(grid: Any, bound: dict[str, Any]) -> tuple[int, int, int]:
    sizes: Any = grid(bound) if callable(grid) else grid
    x, y, z = [*sizes, 1, 1][:3]
    return int(x), int(y), int(z)
