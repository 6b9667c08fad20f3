"""What this machine can do, measured."""

import time

import torch

_SECONDS = 0.1
_LARGEST = 1000


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = _SECONDS) -> float:
    """Best floating-point operations per second of a square matrix product within about `seconds`: 2 n^3 / time with n
    = 4,096 on a GPU and 512 on a CPU, where n = 1,024 takes longer and is no faster.
    """
    size = 4096 if device.type == "cuda" else 512
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, end = float("inf"), 0.0
    for attempt in range(_LARGEST):
        started = time.perf_counter()
        product = left @ left
        if device.type == "cuda":
            product[0, 0].item()
        took = time.perf_counter() - started
        if attempt == 0:  # sets the library up
            end = started + took + seconds
            continue
        best = min(best, took)
        if attempt >= 2 and time.perf_counter() > end:
            break
    return 2.0 * size**3 / best
