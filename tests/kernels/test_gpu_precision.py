"""What the CUDA launchers compute in: fp32 is fp32 unless TF32 is asked for, and fp64 is fp64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from astrobiogen.kernels.conv_nd import triton_kernels as conv_nd
from astrobiogen.kernels.rms_norm import reference as rms_norm_reference
from astrobiogen.kernels.rms_norm import triton_kernels as rms_norm

MATRICES = torch.backends.cuda.matmul
CONVOLUTIONS = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = MATRICES.fp32_precision, CONVOLUTIONS.fp32_precision
    yield
    MATRICES.fp32_precision, CONVOLUTIONS.fp32_precision = before  # pyright: ignore[reportAttributeAccessIssue]


def precision(dtype: torch.dtype = torch.float32) -> str:
    return conv_nd._precision(torch.empty(1, dtype=dtype))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_nd, "capability", lambda _: 86)


@pytest.mark.usefixtures("compiled")
def test_fp32_convolutions_are_exact_by_default() -> None:
    assert CONVOLUTIONS.fp32_precision == "tf32"  # PyTorch's own default, so that it is no request
    assert precision() == "ieee"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_tf32_is_for_those_who_ask(half: torch.dtype) -> None:
    MATRICES.fp32_precision = "tf32"
    assert precision() == "tf32"
    assert precision(half) == "ieee"
    CONVOLUTIONS.fp32_precision = "ieee"
    assert precision() == "ieee"


@pytest.mark.usefixtures("compiled")
def test_reading_the_settings_never_raises() -> None:
    CONVOLUTIONS.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):  # what the library used to read
        bool(torch.backends.cudnn.allow_tf32)
    assert precision() == "ieee"


def norms(call: Any, *shape: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    forward, added, backward = call.rms_norm, call.add_rms_norm, call.rms_norm_backward
    y, rstd = forward(x, weight, 1e-6)
    return y, rstd, *added(x, y, weight, 1e-6), *backward(y, x, weight, rstd, None)


class Reference:
    """The plain functions under the launchers' names."""

    rms_norm = staticmethod(rms_norm_reference.rms_norm_forward)
    add_rms_norm = staticmethod(rms_norm_reference.add_rms_norm_forward)
    rms_norm_backward = staticmethod(rms_norm_reference.rms_norm_backward)


def test_fp64_norms_are_computed_in_fp64() -> None:
    for got, exact in zip(norms(rms_norm, 3, 40), norms(Reference, 3, 40)):
        assert got.dtype == torch.float64
        assert torch.equal(got, exact)
