"""Speed of a run: samples/s, tokens/s, and the share of the machine's own matrix-multiplication rate (MFU)."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import astrobiogen
from astrobiogen.training import evaluation
from astrobiogen.training.batches import loading, weighting
from astrobiogen.training.batches.task import Task
from astrobiogen.training.optim import matmul_rate
from astrobiogen.training.tools import fake

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
        """Rates of a window that took `seconds` of wall-clock time, data loading included. A share above 1 is left out:
        the machine was busy with something else when `peak` was measured.
        """
        seconds = max(seconds, 1e-9)
        rates = {"seconds": round(seconds, 4), "samples_per_second": round(samples / seconds, 3)}
        if tokens:
            rates["tokens_per_second"] = round(tokens / seconds, 1)
        if self.flops_per_sample and self.peak:
            share = self.flops_per_sample * samples / seconds / self.peak
            if share <= 1:
                rates["mfu"] = round(share, 5)
        return rates

    def describe(self) -> str:
        """In one line."""
        counted = f"{self.flops_per_sample / 1e9:.3g} GFLOP per sample; " if self.flops_per_sample else ""
        return f"{counted}matrix products reach {self.peak / 1e9:.3g} GFLOP/s"


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
    plain PyTorch implementation of every op, times three. Nothing is computed: the tensors of the pass have shapes and
    no memory. Random generators and the model are left as they were.
    """
    shapes = fake.Shapes()
    batch, tensors = shapes.of(batch), shapes.of_model(model)
    plainly = astrobiogen.use_kernels("reference")
    with evaluation.frozen(model), plainly, torch.no_grad(), shapes.mode, _Counter() as counter:
        loss_function(torch.func.functional_call(model, tensors, (batch,)), batch)
    return _TRAINING_FACTOR * counter.flops


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of matrix products in `dtype`, on a CPU in fp32 if that is faster: where a half precision
    has no units, kernels compute in fp32.
    """
    rate = matmul_rate.matmul_rate(device, dtype)
    half_on_cpu = device.type == "cpu" and dtype != torch.float32
    return max(rate, matmul_rate.matmul_rate(device, torch.float32)) if half_on_cpu else rate


def measure(task: Task, device: torch.device, dtype: torch.dtype) -> Throughput:
    """Count the operations of the first batch of epoch 0 and measure the device's rate."""
    indices = next(iter(task.sampler.batches(0)))
    weights = next(task.model.parameters())
    batch = loading.to_device(task.collate([task.train[index] for index in indices]), weights.device)
    read = weighting.TextShare(task.text_share, 0)(0, tuple(indices))
    if read is not None:
        batch = weighting.reading(batch, indices, read)
    return Throughput(count_flops(task.model, task.loss_function, batch) / len(indices), peak(device, dtype))
