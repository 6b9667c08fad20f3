"""One model on several processes: copies whose gradients are averaged (DDP), or shards (FSDP2)."""

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from astrobiogen.training.config import DistributedConfig
from astrobiogen.training.distributed.world import World
from astrobiogen.training.types import LossFunction


class Objective(nn.Module):
    """Model and loss function as one module, so that DDP sees which parameters the *loss* depends on."""

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function

    def forward(
        self, batch: dict[str, Any], emphasis: dict[str, float] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of `batch` and its terms, the terms detached."""
        outputs = self.model(batch)
        loss, parts = self._loss_function(outputs, batch, emphasis) if emphasis else self._loss_function(outputs, batch)
        return loss, {name: value.detach() for name, value in parts.items()}


class Parallel:
    """The model as the processes of `world` train it together.

    Gradients come out as the *average* over processes in every strategy, hence `Updater` multiplies each process's
    weights by their number. `model` keeps its parameter names; under FSDP2 its parameters become sharded `DTensor`s.

    * One process: the model itself.
    * `ddp`: every process holds everything. Gradients are summed up locally (`no_sync`) and averaged once per update.
    * `fsdp2`: parameters, gradients and optimizer state are split along their first axis over the processes, in
      groups of one block of the model each. Inside a block's forward and backward its parameters are whole, ordinary
      tensors, which is what the library's operators see. With `cpu_offload` the shards live in host memory between
      uses and the update runs there.

    Attributes:
        objective: (batch, factors) -> loss and terms, whose backward pass exchanges what is to be exchanged.
        whole_objective: the same without DDP's exchange.

    Args:
        dtype: of the forward pass; with a half format FSDP2 also gathers the parameters of each block in it (half the
            traffic and memory), while gradients are summed over processes in fp32 and the shards stay fp32.
        every_parameter: every batch's loss depends on every parameter. Otherwise DDP walks through the graph of each
            update's last micro-batch for those it does not, and agrees on them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        world: World,
        config: DistributedConfig,
        device: torch.device,
        dtype: torch.dtype,
        every_parameter: bool = False,
    ) -> None:
        self.model = model
        self.world = world
        self.strategy = config.strategy if world.distributed else "single"
        self._every_round = config.reduce_every_round
        self.whole_objective = objective = Objective(model, loss_function)
        self.objective: nn.Module = objective
        if self.strategy == "fsdp2":
            shard(model, init_device_mesh(device.type, (world.size,)), config, dtype)
        elif self.strategy == "ddp":
            self.objective = DistributedDataParallel(
                objective, find_unused_parameters=not every_parameter, gradient_as_bucket_view=True
            )

    @classmethod
    def alone(cls, model: nn.Module, loss_function: LossFunction) -> "Parallel":
        """The model in one process."""
        return cls(model, loss_function, World(), DistributedConfig(), torch.device("cpu"), torch.float32)

    @property
    def sharded(self) -> bool:
        """Whether the parameters are shards."""
        return self.strategy == "fsdp2"

    @property
    def local_gradients(self) -> bool:
        """Whether gradients in the middle of an update differ between processes."""
        return self.strategy == "ddp"

    def may_stop(self, closes: bool) -> bool:
        """Whether a checkpoint after this round would hold all that a resumed run needs."""
        return closes or not self.sharded or self._every_round

    def anywhere(self, flag: torch.Tensor) -> torch.Tensor:
        """1.0 where `flag` is 1.0 in any process; on its device and without a wait for it."""
        if self.world.distributed:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def accumulating(self, closes: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward and backward pass; gradients are exchanged in it if it `closes` an update."""
        if isinstance(self.objective, DistributedDataParallel) and not closes:
            return self.objective.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(closes or self._every_round)
        return contextlib.nullcontext()


def shard(model: nn.Module, mesh: DeviceMesh, config: DistributedConfig, dtype: torch.dtype) -> None:
    """Apply FSDP2 to `model` in place: one group for each block (outermost member of an `nn.ModuleList`), one for the
    rest.
    """
    # Said of the root, whose outputs may be views: writing into them would lose gradients; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The rest holds embeddings, physical constants and heads, few of the bytes: they stay fp32.
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(
            block, mesh=mesh, mp_policy=whole if dtype == torch.float32 else half, offload_policy=offload,
            reshard_after_forward=config.reshard_after_forward,
        )  # fmt: skip
    # Always resharded: a root left whole after a pass without gradients would have no shards to save.
    fully_shard(model, mesh=mesh, mp_policy=whole, offload_policy=offload, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of `model`: members of its outermost module lists that hold parameters."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(one for one in child if any(True for _ in one.parameters()))
            else:
                visit(child)

    visit(model)
    return found


def gathered_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """About what whole parameters take at the peak of an FSDP2 backward pass over `model`: those outside all blocks,
    and two blocks (one in use, the next on its way), each as it arrived and as parameters, and the gradients of one.
    """
    sizes = sorted(sum(value.numel() for value in block.parameters()) for block in blocks(model))
    outside = sum(value.numel() for value in model.parameters()) - sum(sizes)
    return (outside + 2 * sum(sizes[-2:])) * dtype.itemsize + 4 * max(sizes, default=0)


def like(reference: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`whole`, the same in all processes, sharded and placed as `reference` is; without communication."""
    if not isinstance(reference, DTensor):
        return whole.to(reference.device)
    there = whole.to(reference.device_mesh.device_type)
    placed = distribute_tensor(there, reference.device_mesh, reference.placements, src_data_rank=None)
    return placed.to(reference.to_local().device) if reference.to_local().device != there.device else placed


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """2-norm of all gradients of all processes, an ordinary tensor."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
