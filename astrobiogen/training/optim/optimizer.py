"""Optimizers, weight-decay groups and averaged weights."""

import contextlib
import importlib
import logging
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from astrobiogen.training.config import OptimizerConfig
from astrobiogen.training.distributed import local_part
from astrobiogen.training.errors import UserError
from astrobiogen.training.optim.gated_adamw import GatedAdamW, gated
from astrobiogen.training.optim.local_shards import LocalShardOptimizer

_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices and kernels are decayed; biases, norm weights and other vectors are
    not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names.

    Raises:
        UserError: an 8-bit optimizer without bitsandbytes.
    """
    groups = decay_groups(model, config.weight_decay)
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    # It warns on stderr of every run on a CPU that a 4-bit matrix product, which is not used here, will be slow.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"optimizer.name: got {config.name!r}, which needs bitsandbytes >= 0.50: pip install 'astrobiogen[bnb]' "
            f"(or --optimizer.name adamw); the import said: {error}"
        ) from error
    make = gated(library, _BITSANDBYTES[config.name])
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return LocalShardOptimizer(groups, options, make)
    optimizer: torch.optim.Optimizer = make(groups, **options)
    return optimizer


def inner_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds the moments."""
    return optimizer.inner if isinstance(optimizer, LocalShardOptimizer) else optimizer


def step_unless(bad: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step of `optimizer`, made by `build_optimizer`, that changes nothing if `bad` is 1.

    Decided on the device (see `GatedAdamW` for the exception); `settle` must follow once the host knows.

    Args:
        bad: 0 or 1, fp32, no axes, the same in all processes, where the gradients are.
    """
    inner = inner_of(optimizer)
    first = inner.param_groups[0]["params"][0]
    if isinstance(first, DTensor):
        bad = DTensor.from_local(bad, first.device_mesh, [Replicate()], run_check=False)
    inner.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()


def settle(optimizer: torch.optim.Optimizer, skipped: bool) -> None:
    """Tell `optimizer` what `bad` was; PyTorch's fused one counts its steps on the device."""
    inner = inner_of(optimizer)
    if isinstance(inner, GatedAdamW):
        inner.settle(skipped)


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers: `a <- decay * a + (1 - decay) * w` after each
    update.

    The decay is warmed up as min(decay, (1 + updates) / (10 + updates)), so that early averages are not the random
    start. Tied weights have one average, under each of their names.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        copies: dict[torch.Tensor, torch.Tensor] = {}
        self.averages: dict[str, torch.Tensor] = {}
        self._names: list[str] = []  # of each tensor once
        for name, value in model.state_dict(keep_vars=True).items():
            if value not in copies:
                copies[value] = value.detach().clone()
                self._names.append(name)
            self.averages[name] = copies[value]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = model.state_dict()
        moving = [name for name in self._names if weights[name].is_floating_point()]
        averages, present = ([local_part(tensors[name]) for name in moving] for tensors in (self.averages, weights))
        torch._foreach_lerp_(averages, present, 1 - decay)
        for name in set(self._names) - set(moving):
            self.averages[name].copy_(weights[name])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in `model`; the raw ones again afterwards."""
        raw = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.averages)
        try:
            yield
        finally:
            model.load_state_dict(raw)
