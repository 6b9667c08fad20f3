"""Compiled Triton kernels on a CPU: an emulator of the PTX that Triton makes for NVIDIA's sm_80, 86 and 89.

Where Triton's interpreter runs a kernel's Python, this runs what the compiler has made of it, with all threads:
layouts, vectorised and masked accesses, shared memory, `ldmatrix`, `mma`, asynchronous copies and barriers. While it
runs it reports what values alone do not show: addresses outside the kernel's tensors, shared memory read before it is
written or while a copy is on its way, and accesses of two warps or two blocks that no barrier orders.

Not covered: ptxas (registers, spills, machine code), timing, and the approximations of special functions.
"""

from astrobiogen.testing.ptx.emulate import Emulation as Emulation
from astrobiogen.testing.ptx.emulate import emulate as emulate
from astrobiogen.testing.ptx.machine.findings import Finding as Finding
from astrobiogen.testing.ptx.machine.findings import KernelError as KernelError
from astrobiogen.testing.ptx.machine.findings import KernelRun as KernelRun
from astrobiogen.testing.ptx.machine.program import UnsupportedInstructionError as UnsupportedInstructionError
