"""`check_battery`: every check, for all cases and dtypes of an op."""

from collections.abc import Sequence

import torch

from astrobiogen.kernels.cases import Case
from astrobiogen.testing._compiler import check_fullgraph, check_opcheck
from astrobiogen.testing._derivatives import check_gradcheck, check_partial_gradients, check_second_derivative
from astrobiogen.testing._habits import check_habits
from astrobiogen.testing._nonfinite import check_nonfinite
from astrobiogen.testing._routes import Implementation
from astrobiogen.testing._transforms import check_transforms
from astrobiogen.testing._values import check_op
from astrobiogen.testing._visibility import check_visibility
from astrobiogen.testing.inputs import Function
from astrobiogen.testing.tolerance import Measurement

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_battery(
    function: Function,
    reference: Function,
    cases: Case | Sequence[Case],
    *,
    ops: Sequence[str],
    implementations: Sequence[Implementation] = ("cpu", "triton"),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Measurement]:
    """Run every check of this package.

    `check_op` for each case, dtype and implementation (Triton only where `case.interpret`, unless a GPU runs it);
    `check_visibility` per implementation for the cases marked `gradcheck` or `masks` (of the reference for the latter).

    For the cases marked `gradcheck`: `check_nonfinite` per implementation, `check_opcheck`, `check_fullgraph`,
    `check_partial_gradients`, `check_transforms` and `check_habits`, on the GPU as well if there is one;
    `check_gradcheck` (of the reference too) and `check_second_derivative`, in fp64 and so on the CPU only: the Triton
    kernels accumulate in fp32.

    Args:
        function: the public function.
        reference: its plain PyTorch definition.
        cases: one case or several; a single one serves `pytest.mark.parametrize`.
        ops: names of the ops it calls, e.g. ``("rms_norm", "rms_norm_backward")``.
        implementations: what to test.
        dtypes: dtypes for `check_op`.

    Returns:
        Every `Measurement` of `check_op`.

    Raises:
        AssertionError: from the first check that fails.
    """
    measurements: list[Measurement] = []
    devices = ("cpu", "cuda") if "triton" in implementations and torch.cuda.is_available() else ("cpu",)
    for case in (cases,) if isinstance(cases, Case) else cases:
        served: list[Implementation] = [
            name for name in implementations if name != "triton" or case.interpret or torch.cuda.is_available()
        ]
        for implementation in served:
            for dtype in dtypes:
                measurements += check_op(function, reference, case, dtype, ops=ops, implementation=implementation)
        if case.masks:
            check_visibility(reference, reference, case)
        for implementation in served if case.masks or case.gradcheck else ():
            check_visibility(function, reference, case, ops=tuple(ops), implementation=implementation)
        if not case.gradcheck:
            continue
        for implementation in served:
            check_nonfinite(function, reference, case, ops=tuple(ops), implementation=implementation)
        for device in devices:
            check_opcheck(function, case, device=device)
            check_fullgraph(function, case, device=device)
            if case.differentiable:
                check_partial_gradients(function, case, device=device)
                check_transforms(function, reference, case, device=device)
                check_habits(function, case, device=device)
        if case.differentiable:
            check_gradcheck(reference, case)
            check_gradcheck(function, case)
            check_second_derivative(function, case)
    return measurements
