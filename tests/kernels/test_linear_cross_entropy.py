"""Linear cross-entropy: the shared battery, agreement with `F.cross_entropy`, options, errors, memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from astrobiogen import use_kernels
from astrobiogen.kernels._case import Case, TensorMaker
from astrobiogen.kernels.linear_cross_entropy import triton_kernels
from astrobiogen.kernels.linear_cross_entropy.op import linear_cross_entropy
from astrobiogen.kernels.linear_cross_entropy.samples import CASES
from astrobiogen.testing import check_battery, check_op

OPS = ("linear_cross_entropy", "linear_cross_entropy_backward")


def fused(**arguments: Any) -> torch.Tensor:
    """The op, a scalar loss as [1]: the battery draws upstream gradients of at least one axis."""
    return torch.atleast_1d(linear_cross_entropy(**arguments))


def plain(**arguments: Any) -> torch.Tensor:
    """The definition, under ordinary autograd."""
    with use_kernels("reference"):
        return fused(**arguments)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_battery(case: Case) -> None:
    check_battery(fused, plain, case, ops=OPS)
