"""Number formats: which one, autocast, and the loss scale of fp16."""

import contextlib
from typing import Any

import torch

from astrobiogen.training.config import PrecisionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(config: PrecisionConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The format of the forward pass and the reason for it. A format that was asked for is never replaced by
    another.
    """
    if config.dtype != "auto":
        return _DTYPES[config.dtype], "as configured"
    if device.type == "cpu":
        return torch.float32, "auto: half formats are emulated, and slow, on most CPUs"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: the GPU has bf16"
    return torch.float16, "auto: the GPU has no bf16"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Context of the forward pass: matrix products in `dtype`, weights in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class LossScaler:
    """Dynamic loss scale for fp16, with a floor.

    PyTorch's own scaler halves without end: after 166 overflows in a row its scale is exactly 0, and the next good
    batch divides 0 by 0 into the weights. This one stops at `min_scale` and halves only after `hysteresis` overflows
    since the last halving or growth. For fp32 and bf16 the scale is 1 and never moves.
    """

    def __init__(self, config: PrecisionConfig, dtype: torch.dtype) -> None:
        self.enabled = dtype == torch.float16
        self.scale = config.initial_scale if self.enabled else 1.0
        self._config = config
        self._good = 0
        self._bad = 0

    def update(self, overflow: bool) -> None:
        """Move the scale after an update that was taken (`overflow` False) or skipped (True)."""
        if not self.enabled:
            return
        if not overflow:
            self._good += 1
            if self._good >= self._config.growth_interval:
                self.scale, self._good, self._bad = min(self.scale * 2.0, 2.0**127), 0, 0
            return
        self._good = 0
        self._bad += 1
        if self._bad >= self._config.hysteresis:
            self.scale, self._bad = max(self.scale / 2.0, self._config.min_scale), 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"scale": self.scale, "good": self._good, "bad": self._bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.scale, self._good, self._bad = state["scale"], state["good"], state["bad"]
