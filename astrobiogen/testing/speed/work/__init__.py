"""What the kernels of each operator have to do at each benchmark size, one module per operator.

Every module has `works(case, machine)`: the launches of one `CompileCase` at the operator's benchmark sizes on one
machine; none for specialisations that no benchmark runs.
"""

import importlib

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.testing.speed.machines import Machine
from astrobiogen.testing.speed.model import Work


def works(op: str, case: CompileCase, machine: Machine) -> list[Work]:
    """The launches of `case`, a specialisation of one of the kernels of `op`, that the model knows."""
    return importlib.import_module(f"{__name__}.{op}").works(case, machine)
