"""What a micro-batch will hold in memory, found by running it with tensors that have none."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from astrobiogen.training import evaluation
from astrobiogen.training.batches import loading
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import fake


class Ledger(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, as long as somebody holds them.

    Attributes:
        held: bytes at present.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, value: Any) -> None:
        """Count the storages of the tensors in `value` that are not counted yet."""
        for tensor in fake.tensors(value):
            self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def released(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, released)
        self.held += size
        self.peak = max(self.peak, self.held)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out


def peak_bytes(
    model: nn.Module,
    loss_function: evaluation.LossFunction,
    batch: loading.Batch,
    dtype: torch.dtype,
    *,
    accumulating: bool = False,
    stored: torch.dtype | None = None,
) -> int:
    """The most that a forward and a backward pass over `batch` hold beyond weights and batch, in bytes: what is saved
    for the backward pass, intermediate results, and the gradients, which with `accumulating` are there before and not
    counted. Not in it: memory that an operation takes and gives back by itself. `stored`: the type of floating-point
    weights, if not their own: FSDP2 gathers them in half precision.

    Nothing is computed. `model` may be on the device meta or of any size; its generators and buffers are left alone.
    """
    shapes = fake.Shapes()
    tensors = shapes.of_model(model, stored)
    with evaluation.untouched(nn.Module()):
        batch, device = shapes.of(batch), next(iter(tensors.values())).device
        with shapes.mode, Ledger() as ledger:
            ledger.add(tensors)
            ledger.add(batch)
            if accumulating:
                for parameter in (one for one in tensors.values() if one.requires_grad):
                    parameter.grad = torch.zeros_like(parameter)
            before = ledger.peak = ledger.held
            named = {f"model.{name}": tensor for name, tensor in tensors.items()}
            torch.func.functional_call(_Pass(model, loss_function, device, dtype), named, (batch,))
            return ledger.peak - before


class _Pass(nn.Module):
    """Forward and backward pass as one module: recomputation in the backward pass finds the same parameters."""

    def __init__(
        self, model: nn.Module, loss_function: evaluation.LossFunction, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function
        self._device, self._dtype = device, dtype

    def forward(self, batch: loading.Batch) -> None:
        """The loss of `batch`, and its gradients."""
        with precision.autocast(self._device, self._dtype):
            loss = self._loss_function(self.model(batch), batch)[0]
        loss.backward()
