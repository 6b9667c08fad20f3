"""The memory plan: exact bytes of what the trainer keeps, measured bytes of what a forward pass saves for its backward
pass."""

import dataclasses
import os
import resource
from typing import Any

import rich.box
import rich.console
import rich.table
import torch
from torch import nn

from astrobiogen import data
from astrobiogen.training.batches import assemble, loading
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed import local_part, runtime
from astrobiogen.training.optim import precision

# bitsandbytes: two moments of one byte each and an fp32 scale per block of 256, from 4,096 elements on; smaller tensors
# stay fp32.
_BLOCK, _SMALLEST = 256, 4096
# Above this the plan does not run a forward pass on this machine.
MEASURE_UP_TO = 200_000_000
# Share of the memory that is left for what the plan does not count (temporaries, fragmentation, CUDA's context).
_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by category; `saved_for_backward` and `batch` are None where nothing was run."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    batch: int | None
    saved_for_backward: int | None

    @property
    def states(self) -> int:
        """Bytes that are held all the time between the first update and the end."""
        return self.weights + self.gradients + self.optimizer + self.average


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
    return Plan(count, weights, gradients, optimizer_bytes(model, config.optimizer.name), average, None, None)


def measured_plan(assembly: assemble.Assembly, config: TrainConfig) -> Plan:
    """`state_plan` with one real forward pass on the CPU, on the micro-batch with the largest graphs and longest
    texts.
    """
    task = assembly.task
    pairs = assembly.bundle.train.pairs
    store = assembly.bundle.train.store

    def size(number: int) -> int:
        graph = store.organisms[pairs[number].organism].graph
        return 0 if graph is None else int(graph.num_nodes or 0)

    largest = sorted(range(len(pairs)), key=size)[-config.data.batch_size :]
    batch: loading.Batch = task.collate([task.train[number] for number in largest])
    device = torch.device("cpu")
    dtype, _ = precision.choose_dtype(config.precision, device)
    task.model.train()

    def run() -> torch.Tensor:
        with precision.autocast(device, dtype):
            return task.loss_function(task.model(batch), batch)[0]

    return dataclasses.replace(
        state_plan(task.model, config), batch=tensor_bytes(batch), saved_for_backward=saved_bytes(task.model, run)
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a plan fits into `budget` bytes, and the largest micro-batch that would (0: not even one sample)."""

    text: str
    batch_size: int


def judge(plan: Plan, config: TrainConfig, budget: int) -> Verdict:
    """Compare `plan` with `budget`, of which a tenth is left for what is not counted. Batch and saved tensors are taken
    as proportional to the micro-batch.
    """
    room = budget * (1 - _MARGIN)
    size, moving = config.data.batch_size, (plan.batch or 0) + (plan.saved_for_backward or 0)
    total = plan.states + moving
    fitting = size if not moving else max(min(int((room - plan.states) * size / moving), size), 0)
    if plan.saved_for_backward is None:
        text = "does not fit" if plan.states > budget else "the states fit; activations are not in this figure"
        return Verdict(text, 0 if plan.states > budget else size)
    if total <= room:
        return Verdict("fits", size)
    if total <= budget:
        return Verdict("too close to call: less than a tenth is left for what is not counted", fitting)
    return Verdict("does not fit", fitting)


def same_update(config: TrainConfig, limit: int) -> str:
    """Options for the same window cut into micro-batches of at most `limit` samples, at least 1."""
    window = config.data.batch_size * config.data.accumulation
    size = next(size for size in range(min(limit, window), 0, -1) if window % size == 0)
    return f"--data.batch_size {size} --data.accumulation {window // size}"


def show(config: TrainConfig, memory_gib: float = 0.0) -> int:
    """Print the plan of `config` and whether it fits into `memory_gib` (0: this machine's); returns the exit code."""
    runtime.prepare(config.runtime, config.seed)
    bundle = assemble.load_bundle(config)
    with torch.device("meta"):
        shape_only, _ = assemble.build_model(config, bundle.spec)
    plan = state_plan(shape_only, config)
    measured = plan.parameters <= MEASURE_UP_TO
    if measured:
        plan = measured_plan(assemble.assemble(config, bundle), config)
    _print(plan, config, bundle, measured)
    budget = int(memory_gib * 2**30) or _machine_memory()
    verdict = judge(plan, config, budget)
    console = rich.console.Console(highlight=False)
    console.print(f"In {budget / 2**30:,.1f} GiB: {verdict.text}.")
    if 0 < verdict.batch_size < config.data.batch_size:
        console.print(f"The same update fits with {same_update(config, verdict.batch_size)}.")
    return 0


def _machine_memory() -> int:
    """Bytes of the GPU, if there is one, else of the main memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _print(plan: Plan, config: TrainConfig, bundle: data.DatasetBundle, measured: bool) -> None:
    console = rich.console.Console()
    table = rich.table.Table("held by the trainer", "MiB", title=f"Memory plan: {config.preset}", box=rich.box.ASCII)
    rows = {
        f"weights ({plan.parameters:,} parameters, fp32)": plan.weights,
        "gradients (fp32)": plan.gradients,
        f"optimizer ({config.optimizer.name})": plan.optimizer,
        "averaged weights": plan.average,
        f"one micro-batch of {config.data.batch_size} (largest graphs)": plan.batch,
        "saved for the backward pass": plan.saved_for_backward,
    }
    for name, value in rows.items():
        table.add_row(name, "not measured" if value is None else f"{value / 2**20:,.1f}")
    table.add_row("together", f"{(plan.states + (plan.batch or 0) + (plan.saved_for_backward or 0)) / 2**20:,.1f}")
    console.print(table)
    if measured:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        console.print(
            "Counted exactly: weights, gradients, optimizer. Measured in one CPU forward pass: batch, saved tensors."
        )
        console.print(
            f"Not in the table: temporaries inside operations, Python and libraries "
            f"(this process peaked at {peak:,.0f} MiB in all)."
        )
    else:
        console.print(
            "Activations were not measured: the model is too large to run here. "
            "The states alone need what the table says."
        )
    console.print(
        f"Micro-batches per epoch: {-(-len(bundle.train) // config.data.batch_size)}; epochs: {config.epochs}."
    )
