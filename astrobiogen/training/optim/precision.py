"""Number formats: which one, autocast, and the loss scale of fp16."""

import contextlib
import dataclasses
from typing import Any

import torch

from astrobiogen.training.config import PrecisionConfig, TrainConfig
from astrobiogen.training.optim import matmul_rate

# Casting weights and activations costs time too: a smaller gain in the products is not worth the digits.
_WORTH_IT = 1.5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(config: PrecisionConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The format of the forward pass and the reason for it. A format that was asked for is never replaced by
    another.
    """
    if config.dtype != "auto":
        return _DTYPES[config.dtype], "as configured"
    if device.type == "cpu":
        return _measured_on_cpu(device)
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 6):
        return torch.float16, "auto: fp16 on sm_86, with a loss scale"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"auto: sm_{major}{minor} has bf16"
    return torch.float16, f"auto: sm_{major}{minor} has no bf16"


def _measured_on_cpu(device: torch.device) -> tuple[torch.dtype, str]:
    """bf16 where its matrix products are clearly faster than fp32's on this processor, else fp32."""
    plain, half = (matmul_rate.matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = f"auto: matrix products reach {half / 1e9:.0f} GFLOP/s in bf16 and {plain / 1e9:.0f} in fp32 here"
    return (torch.bfloat16 if half >= _WORTH_IT * plain else torch.float32), found


def resolved(config: TrainConfig, dtype: torch.dtype) -> TrainConfig:
    """`config` with `dtype` in place of "auto", so that a resumed run does not measure, and perhaps choose, anew."""
    name = next(name for name, value in _DTYPES.items() if value == dtype)
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, dtype=name))


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

    @property
    def can_fall(self) -> bool:
        """Whether a smaller scale may mend an overflow."""
        return self.enabled and self.scale > self._config.min_scale

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
