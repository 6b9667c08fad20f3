"""The memory plan: exact bytes of what the trainer keeps, and what a rehearsal without memory finds for the rest."""

import dataclasses
from typing import Any

import torch
from torch import nn

from astrobiogen.training import evaluation
from astrobiogen.training.batches import assemble, loading
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed import local_part
from astrobiogen.training.distributed.model import gathered_bytes
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import rehearsal

# bitsandbytes: two moments of one byte each and an fp32 scale per block of 256, from 4,096 elements on; smaller tensors
# stay fp32.
_BLOCK, _SMALLEST = 256, 4096
# Share of the memory that is left for what the plan does not count (libraries, fragmentation, CUDA's context).
_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by category in each of `processes`.

    Attributes:
        parameters: their number in the whole model.
        weights, gradients, optimizer, average: see `state_plan`.
        exchanged: what a process fetches of the others: FSDP2's whole blocks.
        batch: one micro-batch, 0 if there is none yet.
        moving: what comes and goes while it is worked on, see `moving_bytes`.
        accumulating: whether gradients stay between micro-batches; else they are part of `moving`.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    exchanged: int = 0
    batch: int = 0
    moving: int = 0
    accumulating: bool = True
    processes: int = 1

    @property
    def states(self) -> int:
        """Bytes that are held from one micro-batch to the next."""
        gradients = self.gradients if self.accumulating else 0
        return self.weights + gradients + self.optimizer + self.average + self.exchanged

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.states + self.batch + self.moving


def optimizer_bytes(model: nn.Module, name: str) -> int:
    """Bytes of the optimizer's state after the first update, in this process."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        count = local_part(parameter).numel()
        if name == "adamw":
            total += 2 * count * parameter.element_size() + 4  # two moments in the weight's type, an fp32 step counter
        elif count >= _SMALLEST:
            total += 2 * (count + 4 * -(-count // _BLOCK))
        else:
            total += 2 * 4 * count
    return total


def saved_bytes(model: nn.Module, run: Any) -> int:
    """Bytes of the distinct storages that `run()`'s graph keeps for its backward pass, the model's own weights left
    out.
    """
    own = {local_part(value).untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def tensor_bytes(value: Any) -> int:
    """Bytes of the distinct storages of all tensors inside `value` (dictionaries, lists, graph batches), of which
    shards count what this process holds."""
    found: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            storage = local_part(item).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            for inner in item.values():
                walk(inner)
        elif isinstance(item, list | tuple):
            for inner in item:
                walk(inner)
        elif hasattr(item, "to_dict"):
            walk(item.to_dict())

    walk(value)
    return sum(found.values())


def state_plan(model: nn.Module, config: TrainConfig) -> Plan:
    """What can be counted without running the model, in this process; works on the meta device."""

    def held(value: torch.Tensor) -> int:
        return local_part(value).numel() * value.element_size()

    count = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(held(value) for value in (*model.parameters(), *model.buffers()))
    gradients = sum(held(value) for value in model.parameters() if value.requires_grad)
    average = weights if config.optimizer.ema_decay else 0
    return Plan(count, weights, gradients, optimizer_bytes(model, config.optimizer.name), average)


def moving_bytes(
    model: nn.Module,
    loss_function: evaluation.LossFunction,
    batch: loading.Batch,
    dtype: torch.dtype,
    *,
    accumulating: bool,
    stored: torch.dtype | None = None,
) -> int:
    """The most that a micro-batch with its update holds beyond what is there before: `rehearsal.peak_bytes`, or at the
    update, if that needs more, the gradients and two arrays as large as the largest parameter. (`stored`: in shards, of
    which each process updates its own.)
    """
    trained = [local_part(value).numel() * value.element_size() for value in model.parameters() if value.requires_grad]
    update = 0 if stored else (0 if accumulating else sum(trained)) + 2 * max(trained, default=0)
    options = {"accumulating": accumulating, "stored": stored}
    return max(rehearsal.peak_bytes(model, loss_function, batch, dtype, **options), update)


def shared_out(whole: Plan, model: nn.Module, config: TrainConfig, dtype: torch.dtype, processes: int) -> Plan:
    """`whole`, the plan of one process, as each of several has it: DDP keeps the gradients in its buckets all the time;
    FSDP2 divides the states and fetches blocks.
    """
    if processes == 1:
        return whole
    if config.distributed.strategy == "ddp":
        return dataclasses.replace(whole, accumulating=True, processes=processes)
    parts = {name: -(-getattr(whole, name) // processes) for name in ("weights", "gradients", "optimizer", "average")}
    return dataclasses.replace(
        whole, **parts, exchanged=gathered_bytes(model, dtype), processes=processes, accumulating=True
    )


def whole_plan(assembly: assemble.Assembly, config: TrainConfig, processes: int = 1) -> Plan:
    """The plan of `config` with the micro-batch of the largest graphs and longest texts. The model of `assembly` may be
    on the device meta: nothing is computed.
    """
    task, dtype = assembly.task, precision.choose_dtype(config.precision, torch.device("cpu"))[0]
    batch = largest_batch(assembly, config)
    task.model.train()
    sharded = processes > 1 and config.distributed.strategy == "fsdp2"
    accumulating = processes > 1 or config.data.accumulation > 1 or config.data.batch_size >= len(assembly.bundle.train)
    stored = dtype if sharded else None
    moving = moving_bytes(task.model, task.loss_function, batch, dtype, accumulating=accumulating, stored=stored)
    whole = dataclasses.replace(
        state_plan(task.model, config), batch=tensor_bytes(batch), moving=moving, accumulating=accumulating
    )
    return shared_out(whole, task.model, config, dtype, processes)


def largest_batch(assembly: assemble.Assembly, config: TrainConfig) -> loading.Batch:
    """The samples of the largest graphs as one micro-batch."""
    pairs, store = assembly.bundle.train.pairs, assembly.bundle.train.store

    def size(number: int) -> int:
        graph = store.organisms[pairs[number].organism].graph
        return 0 if graph is None else int(graph.num_nodes or 0)

    largest = sorted(range(len(pairs)), key=size)[-config.data.batch_size :]
    return assembly.task.collate([assembly.task.train[number] for number in largest])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a plan fits into `budget` bytes, and the largest micro-batch that would (0: not even one sample)."""

    text: str
    batch_size: int

    @property
    def fits(self) -> bool:
        """Whether the run may start."""
        return self.text != DOES_NOT_FIT


FITS, DOES_NOT_FIT = "fits", "does not fit"
TOO_CLOSE = "too close to call: less than a tenth is left for what is not counted"


def judge(plan: Plan, config: TrainConfig, budget: int) -> Verdict:
    """Compare `plan` with `budget`, of which a tenth is left for what is not counted. Batch and what moves are taken as
    proportional to the micro-batch.
    """
    room = budget * (1 - _MARGIN)
    size, moving = config.data.batch_size, plan.batch + plan.moving
    fitting = size if not moving else max(min(int((room - plan.states) * size / moving), size), 0)
    text = FITS if plan.peak <= room else TOO_CLOSE if plan.peak <= budget else DOES_NOT_FIT
    return Verdict(text, fitting)


def same_update(config: TrainConfig, limit: int) -> str:
    """Options for the same window cut into micro-batches of at most `limit` samples, at least 1."""
    window = config.data.batch_size * config.data.accumulation
    size = next(size for size in range(min(limit, window), 0, -1) if window % size == 0)
    return f"--data.batch_size {size} --data.accumulation {window // size}"
