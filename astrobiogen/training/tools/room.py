"""Whether a run fits into memory: the plan as a table, the cheapest change that fits, the hours that it takes."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import rich.box
import rich.console
import rich.table
import torch

from astrobiogen import data
from astrobiogen.training.batches import assemble
from astrobiogen.training.config import TrainConfig
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import UserError
from astrobiogen.training.optim import precision
from astrobiogen.training.tools import plan, throughput
from astrobiogen.training.tools.plan import Plan

_LOG = logging.getLogger("astrobiogen")
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup/memory.max")
# The card that the presets of this name are for: its memory, and fp16 products with fp32 sums by its data sheet.
_CARD, _CARD_GIB, _CARD_FLOPS = "RTX A5000", 24.0, 111.1e12
# Per sample at most this and so many times the weights come and go, generously: a plan far below the limit need not be
# made before each run.
_SAMPLE_BYTES, _SAMPLE_WEIGHTS = 64 * 2**20, 6
_PROCESSES = (2, 4, 8)


class Planner:
    """Plans of one configuration and of changes to it; what a micro-batch needs is rehearsed once per kind."""

    def __init__(self, config: TrainConfig, bundle: data.DatasetBundle) -> None:
        self.config, self._bundle = config, bundle
        self._known: dict[str, Plan] = {}

    def __call__(self, config: TrainConfig, processes: int) -> Plan:
        """The plan of each process."""
        key = repr((config.data, config.model, config.precision, config.optimizer, config.distributed, processes))
        if key not in self._known:
            self._known[key] = plan.whole_plan(assemble.assemble(config, self._bundle, "meta"), config, processes)
        return self._known[key]


Change = tuple[str, TrainConfig, int]


def _changes(config: TrainConfig, processes: int, fitting: int) -> Iterator[Callable[[TrainConfig, int], Change]]:
    """What needs less memory, the cheapest first: (words, configuration, processes) of the one before."""
    size = config.data.batch_size
    if size > 1:

        def smaller(before: TrainConfig, count: int) -> Change:
            words = plan.same_update(before, max(1, min(fitting, size // 2)))
            part, parts = int(words.split()[1]), int(words.split()[3])
            cut = dataclasses.replace(before.data, batch_size=part, accumulation=parts)
            return words, dataclasses.replace(before, data=cut), count

        yield smaller

    def recomputed(before: TrainConfig, count: int) -> Change:
        names = ("cnn_config", "graph_config", "llm_config")
        groups = {
            name: dataclasses.replace(getattr(before.model, name), use_gradient_checkpointing=True) for name in names
        }
        words = " ".join(f"--model.{name}.use_gradient_checkpointing true" for name in names)
        return words, dataclasses.replace(before, model=dataclasses.replace(before.model, **groups)), count

    yield recomputed
    if config.optimizer.name == "adamw":
        yield lambda before, count: (
            "--optimizer.name adamw8bit",
            dataclasses.replace(before, optimizer=dataclasses.replace(before.optimizer, name="adamw8bit")),
            count,
        )
    if config.precision.dtype == "fp32":
        yield lambda before, count: (
            "--precision.dtype bf16",
            dataclasses.replace(before, precision=dataclasses.replace(before.precision, dtype="bf16")),
            count,
        )
    for number in (one for one in _PROCESSES if one > processes):
        yield lambda before, _count, number=number: (
            f"--distributed.strategy fsdp2 on {number} GPUs",
            dataclasses.replace(before, distributed=dataclasses.replace(before.distributed, strategy="fsdp2")),
            number,
        )


def cheapest(planner: Planner, processes: int, budget: int) -> str:
    """The options of the cheapest change of the planner's configuration that fits; of all changes together, in the
    order of their price, as few as it takes, if none does alone; empty if all together do not.
    """
    config = planner.config
    fitting = plan.judge(planner(config, processes), config, budget).batch_size
    changes = list(_changes(config, processes, fitting))
    for change in changes:
        words, changed, count = change(config, processes)
        if plan.judge(planner(changed, count), changed, budget).text == plan.FITS:
            return words
    taken: dict[str, str] = {}
    changed, count = config, processes
    for change in changes:
        words, changed, count = change(changed, count)
        taken[words.split()[0]] = words
        if plan.judge(planner(changed, count), changed, budget).text == plan.FITS:
            return " ".join(taken.values())
    return ""


def expected_processes(config: TrainConfig) -> int:
    """How many processes a plan is for: those that torchrun has started, else those that the preset is named for."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    return launched if launched > 1 else 2 if config.preset == "a5000x2" else 1


def machine_memory() -> int:
    """Bytes of the GPU, if there is one, else of the main memory, or of what this process's group may use of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return min(whole, int(limit)) if limit.isdigit() else whole


def allowance(config: TrainConfig, memory_gib: float = 0.0) -> tuple[bool, int, str]:
    """What a plan is compared with: whether for the card that the preset is named for, bytes, and words for them.
    `memory_gib` as asked for; 0: the memory of the preset's card where there is no GPU, else the machine's.
    """
    for_card = config.preset.startswith("a5000") and not torch.cuda.is_available()
    gib = memory_gib or (_CARD_GIB if for_card else machine_memory() / _GIB)
    whose = f"{_CARD}, {gib:g} GiB" if for_card and not memory_gib else f"{gib:,.1f} GiB"
    return for_card, int(gib * _GIB), whose


def show(config: TrainConfig, memory_gib: float = 0.0, processes: int = 0) -> int:
    """Print the plan of `config` for `processes` (0: see `expected_processes`), whether it fits into `memory_gib` (0:
    the memory of the preset's card, this GPU's or this machine's), and how long the run takes; returns the exit code.
    """
    runtime.prepare(config.runtime, config.seed)
    bundle = assemble.load_bundle(config)
    count = processes or expected_processes(config)
    planner = Planner(config, bundle)
    made = planner(config, count)
    console = rich.console.Console(highlight=False)
    _table(made, config, console)
    for_card, size, whose = allowance(config, memory_gib)
    verdict = plan.judge(made, config, size)
    console.print(f"In {whose}{' per process' if count > 1 else ''}: {verdict.text}.", soft_wrap=True)
    if verdict.text != plan.FITS:
        change = cheapest(planner, count, size)
        words = f"The cheapest change that fits: {change}" if change else "No change of settings fits: a smaller model"
        console.print(f"{words}.", soft_wrap=True)
    console.print(_hours(config, bundle, count, for_card), soft_wrap=True)
    return 0


def _hours(config: TrainConfig, bundle: data.DatasetBundle, processes: int, for_card: bool) -> str:
    """How long the whole run takes at least, in words."""
    assembly = assemble.assemble(config, bundle, "meta")
    task, size = assembly.task, config.data.batch_size
    batch = plan.largest_batch(assembly, config)
    each = throughput.count_flops(task.model, task.loss_function, batch) / min(size, len(bundle.train))
    total = each * len(bundle.train) * config.epochs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = precision.choose_dtype(config.precision, device)[0]
    rate = _CARD_FLOPS if for_card else throughput.peak(device, dtype)
    origin = f"predicted, from the data sheet of the {_CARD}" if for_card else "measured here"
    return (
        f"{len(bundle.train):,} samples x {config.epochs} epochs x {each / 1e12:.3g} TFLOP: at least "
        f"{total / rate / processes / 3600:.2g} hours at the rate of matrix products, {rate / 1e12:.3g} TFLOP/s "
        f"({origin}){f' in each of {processes} processes' if processes > 1 else ''}."
    )


def require(config: TrainConfig, bundle: data.DatasetBundle, device: torch.device, processes: int) -> None:
    """Refuse a run whose plan does not fit into the memory of `device`; one that is far from it is not planned.

    Raises:
        UserError: with the bytes, and the cheapest change that fits.
    """
    shared = processes if device.type == "cpu" else 1
    budget = machine_memory() // shared
    with torch.device("meta"):
        model, _ = assemble.build_model(config, bundle.spec)
    states = plan.state_plan(model, config)
    samples = config.data.batch_size * (_SAMPLE_BYTES + _SAMPLE_WEIGHTS * states.weights)
    if states.states + samples < budget // 2:
        return
    planner = Planner(config, bundle)
    made = planner(config, processes)
    verdict = plan.judge(made, config, budget)
    if verdict.fits:
        if verdict.text != plan.FITS:
            _LOG.warning("memory: %s of %.1f GiB", verdict.text, budget / _GIB)
        return
    change = cheapest(planner, processes, budget)
    advice = f"this fits: {change}" if change else "no change of settings fits: a smaller --preset"
    raise UserError(
        f"the run needs {made.peak / _GIB:,.1f} GiB {'per process ' if processes > 1 else ''}and there are "
        f"{budget / _GIB:,.1f}; {advice}; --plan shows where the bytes go, --force starts all the same"
    )


def _table(made: Plan, config: TrainConfig, console: rich.console.Console) -> None:
    title = f"Memory plan: {config.preset}" + (f", each of {made.processes} processes" if made.processes > 1 else "")
    table = rich.table.Table("held by the trainer", "MiB", title=title, box=rich.box.ASCII)
    gradients = "gradients (fp32)" if made.accumulating else "gradients (fp32; within the last row)"
    rows = {
        f"weights ({made.parameters:,} parameters, fp32)": made.weights,
        gradients: made.gradients,
        f"optimizer ({config.optimizer.name})": made.optimizer,
        "averaged weights": made.average,
        f"exchanged by processes ({config.distributed.strategy})": made.exchanged,
        f"one micro-batch of {config.data.batch_size} (largest graphs)": made.batch,
        "activations, copies in half precision, temporaries": made.moving,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value / 2**20:,.1f}")
    table.add_row("at the peak", f"{made.peak / 2**20:,.1f}")
    console.print(table)
    console.print(
        "Counted: weights, gradients, optimizer. Rehearsed without memory: a micro-batch forward and backward. Not in "
        "the table: Python, libraries, and what an operation takes and gives back by itself.",
        soft_wrap=True,
    )
