"""Speed of a run: samples/s, tokens/s, and the share of the machine's own matrix-multiplication rate (MFU)."""

import dataclasses
import logging
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import astrobiogen
from astrobiogen.training import evaluation
from astrobiogen.training.batches import loading, weighting
from astrobiogen.training.batches.task import Task
from astrobiogen.training.observe import failure
from astrobiogen.training.optim import matmul_rate
from astrobiogen.training.tools import plan

_LOG = logging.getLogger("astrobiogen")
# A backward pass costs two forward passes: one product for the input's gradient, one for the weight's.
_TRAINING_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What turns seconds into rates.

    Attributes:
        flops_per_sample: of forward and backward together; 0 if unknown.
        peak: floating-point operations per second that a large matrix product reaches on this device; 0 if unknown.
    """

    flops_per_sample: float = 0.0
    peak: float = 0.0

    def rates(self, seconds: float, samples: int, tokens: int) -> dict[str, float]:
        """Rates of a window that took `seconds` of wall-clock time, data loading included."""
        seconds = max(seconds, 1e-9)
        rates = {"seconds": round(seconds, 4), "samples_per_second": round(samples / seconds, 3)}
        if tokens:
            rates["tokens_per_second"] = round(tokens / seconds, 1)
        if self.flops_per_sample and self.peak:
            rates["mfu"] = round(self.flops_per_sample * samples / seconds / self.peak, 5)
        return rates


class _Counter(TorchDispatchMode):
    """Adds up PyTorch's formulas. (`FlopCounterMode` also hooks every module for a table, and these hooks want a
    gradient.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def count_flops(model: nn.Module, loss_function: evaluation.LossFunction, batch: loading.Batch) -> int:
    """Matrix-product and convolution operations of one training pass over `batch`: those of a forward pass with the
    plain PyTorch implementation of every op, times three. Random generators and the model are left as they were.
    """
    with evaluation.frozen(model), astrobiogen.use_kernels("reference"), torch.no_grad(), _Counter() as counter:
        loss_function(model(batch), batch)
    return _TRAINING_FACTOR * counter.flops


def measure(task: Task, device: torch.device, dtype: torch.dtype) -> Throughput:
    """Count the operations of the first batch of epoch 0 and measure the device's rate in `dtype`. A model that would
    take long or too much memory for this one pass is not counted, which is said.
    """
    peak = matmul_rate.matmul_rate(device, dtype)
    weights = next(task.model.parameters())
    if weights.device.type == "cpu" and sum(value.numel() for value in task.model.parameters()) > plan.MEASURE_UP_TO:
        _LOG.info("operations not counted, so no MFU: the model is too large for a pass on the CPU")
        return Throughput(0.0, peak)
    indices = next(iter(task.sampler.batches(0)))
    batch = loading.to_device(task.collate([task.train[index] for index in indices]), weights.device)
    read = weighting.TextShare(task.text_share, 0)(0, tuple(indices))
    if read is not None:
        batch = weighting.reading(batch, indices, read)
    try:
        flops = count_flops(task.model, task.loss_function, batch)
    except RuntimeError as error:
        if not failure.is_out_of_memory(error):
            raise
        _LOG.warning("operations not counted, so no MFU: too little memory for the plain implementations")
        flops = 0
    return Throughput(flops / len(indices), peak)
