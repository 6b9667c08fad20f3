"""`emulate`: anybody's Triton kernels, compiled and run without a GPU."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from astrobiogen.testing.ptx.machine.findings import Finding, KernelError, KernelRun


@dataclasses.dataclass(frozen=True)
class Emulation:
    """What `emulate` has seen.

    Attributes:
        result: what the launching function returned; None if a kernel ended early.
        kernels: the launches, in order.
    """

    result: Any
    kernels: tuple[KernelRun, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings; a kernel that ended early is one too."""
        found = [finding for run in self.kernels for finding in run.findings]
        return (*found, *(Finding(run.fault, run.kernel) for run in self.kernels if run.fault))

    @property
    def instructions(self) -> int:
        """Run in all; an instruction that many threads ran together counts once."""
        return sum(run.instructions for run in self.kernels)

    def check(self) -> None:
        """AssertionError with all findings, if there are any."""
        assert not self.findings, "\n".join(str(finding) for finding in self.findings)


def emulate(
    launch: Callable[..., Any], arguments: Sequence[Any] | Mapping[str, Any] = (), *, arch: int = 86,
    edit: Callable[[str], str] | None = None,
) -> Emulation:  # fmt: skip
    """Run a function that launches Triton kernels, on CPU tensors, with the kernels compiled for `arch` and emulated.

        def softmax(x):
            y = torch.empty_like(x)
            softmax_kernel[(x.shape[0],)](x, y, x.shape[1], BLOCK=128)
            return y

        seen = emulate(softmax, (torch.randn(4, 100),))
        seen.check()                   # no address outside the tensors, no race
        torch.testing.assert_close(seen.result, expected)

    The kernels write into the tensors that they are given. Arithmetic is that of the compiled code: bf16 and fp16 are
    rounded where a GPU rounds them; sums of one tensor-core instruction and special functions (exp2, sqrt) are more
    exact than a GPU's. A launch costs seconds rather than microseconds: choose sizes of a few tiles.

    Args:
        launch: launches kernels with `kernel[grid](...)`.
        arguments: of `launch`, by position or by name.
        arch: compute capability, 80, 86 or 89.
        edit: changes the PTX of every kernel before it runs; for planting faults.

    Returns:
        The function's result and every launch with its findings.

    Raises:
        ValueError: another `arch`.
        RuntimeError: Triton's interpreter is on (TRITON_INTERPRET=1), for which kernels are not compiled.
        UnsupportedInstructionError: a kernel uses an instruction that is not emulated.
    """
    launching = importlib.import_module("astrobiogen.testing.ptx.launch")  # Triton is not on every machine
    with launching.emulated_launches(arch, edit=edit) as emulator:
        try:
            named = dict(arguments) if isinstance(arguments, Mapping) else {}
            result = launch(**named) if named else launch(*arguments)
        except KernelError:
            result = None
    return Emulation(result, tuple(emulator.runs))
