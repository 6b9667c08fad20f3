"""The memory plan: exact bytes of what the trainer keeps, measured bytes of what a forward pass saves for its backward
pass."""

import dataclasses
import resource
from typing import Any

import rich.box
import rich.console
import rich.table
import torch
from torch import nn

from astrobiogen import data
from astrobiogen.training import assemble, loading, precision, runtime
from astrobiogen.training.config import TrainConfig

# bitsandbytes: two moments of one byte each and an fp32 scale per block of 256, from 4,096 elements on; smaller tensors
# stay fp32.
_BLOCK, _SMALLEST = 256, 4096
# Above this the plan does not run a forward pass on this machine.
MEASURE_UP_TO = 200_000_000


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
    """Bytes of the optimizer's state after the first update."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        count = parameter.numel()
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
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
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


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(item) for item in value.values())
    if hasattr(value, "to_dict"):
        return _tensor_bytes(value.to_dict())
    return 0


def state_plan(model: nn.Module, config: TrainConfig) -> Plan:
    """What can be counted without running the model; works on the meta device."""
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    gradients = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
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
        state_plan(task.model, config), batch=_tensor_bytes(batch), saved_for_backward=saved_bytes(task.model, run)
    )


def show(config: TrainConfig) -> int:
    """Print the plan of `config`; returns the exit code."""
    runtime.prepare(config.runtime, config.seed)
    bundle = assemble.load_bundle(config)
    with torch.device("meta"):
        shape_only, _ = assemble.build_model(config, bundle.spec)
    plan = state_plan(shape_only, config)
    measured = plan.parameters <= MEASURE_UP_TO
    if measured:
        plan = measured_plan(assemble.assemble(config, bundle), config)
    _print(plan, config, bundle, measured)
    return 0


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
