"""More than 2^31 elements: offsets that an int32 cannot hold must reach the right memory.

Inputs are bf16, and one row expanded over all others where the op takes that, so that mostly the results are real
memory. Rows that were made of the same numbers must come out equal, the last one past 2^31 elements.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from astrobiogen import ops
from astrobiogen.kernels.rms_norm import triton_kernels as rms_norm_kernels
from astrobiogen.kernels.rope import triton_kernels as rope_kernels
from astrobiogen.kernels.swiglu import triton_kernels as swiglu_kernels

ROWS, COLUMNS = 2**31 // 4352 + 2, 4352
CHECKED = (0, 1, ROWS // 2, ROWS - 2, ROWS - 1)
# The result, 4.3 GB, and for RMSNorm its input; as much again for the rest of the machine.
NEEDED = {"rms_norm": 17 * 2**30, "swiglu": 9 * 2**30, "rope": 9 * 2**30}


def available_bytes(device: str) -> int:
    """Memory that an allocation may still get."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


def rms_norm(device: str) -> torch.Tensor:
    # an expanded x would be made contiguous first, slowly
    x = torch.ones(ROWS, COLUMNS, device=device, dtype=torch.bfloat16)
    row = torch.randn(COLUMNS, device=device)
    for index in CHECKED:
        x[index] = row
    return ops.rms_norm(x, torch.ones(COLUMNS, device=device, dtype=torch.bfloat16))


def swiglu(device: str) -> torch.Tensor:
    packed = torch.randn(1, 2 * COLUMNS, device=device, dtype=torch.bfloat16).expand(ROWS, 2 * COLUMNS)
    return ops.swiglu_packed(packed)


def rope(device: str) -> torch.Tensor:
    x = torch.randn(1, 1, 64, 68, device=device, dtype=torch.bfloat16).expand(1, ROWS, 64, 68)
    cos, sin = ops.rope_frequencies(1, 68, offset=3, device=device)
    return ops.rope(x, cos.expand(ROWS, 34), sin.expand(ROWS, 34))


@pytest.mark.parametrize("function", [rms_norm, swiglu, rope], ids=lambda function: function.__name__)
def test_the_last_row_is_right(function: Callable[[str], torch.Tensor]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed, free = NEEDED[function.__name__], available_bytes(device)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, {free / 2**30:.1f} GiB are available")
    result = function(device).reshape(ROWS, COLUMNS)
    assert result.numel() > 2**31
    first = result[0].clone()
    assert first.any()
    for row in CHECKED[1:]:
        assert torch.equal(result[row], first)


@pytest.mark.parametrize(
    "kernel",
    [
        rms_norm_kernels._rms_norm_fwd_kernel,
        rms_norm_kernels._rms_norm_bwd_kernel,
        swiglu_kernels._swiglu_fwd_kernel,
        swiglu_kernels._swiglu_bwd_kernel,
        rope_kernels._rope_kernel,
    ],
    ids=lambda kernel: kernel.fn.__name__,
)
def test_triton_kernels_widen_the_row_before_they_scale_it(kernel) -> None:
    """Without a GPU their addressing cannot be run at this size."""
    assert "int64" in kernel.fn.__code__.co_names
