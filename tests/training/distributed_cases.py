"""Run by `test_distributed.py` in each of two processes: every case trains, and process 0 stores what came out.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python tests/training/distributed_cases.py FOLDER
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astrobiogen.training.batches.task import Task
from astrobiogen.training.config import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
)
from astrobiogen.training.config.run_folder import MEMORY
from astrobiogen.training.config.watch import SpikeConfig
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import World, runtime
from astrobiogen.training.observe.monitor import Monitor, read_log
from astrobiogen.training.trainer import Trainer
from tests.training import distributed_disagreement, ragged

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("conftest.py"))
assert _spec is not None
assert _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
sys.modules["toy"] = toy
_spec.loader.exec_module(toy)

WIDTH = 96  # 96 x 96 = 9,216 weights: 8-bit moments also for half of them

EIGHT_BIT = OptimizerConfig(name="adamw8bit", learning_rate=0.01, ema_decay=0.9, eps=1e-2)


class Block(nn.Module):
    """A residual block; notes the kind and type of its weight during the forward pass."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.seen: set[tuple[type, torch.dtype]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add((type(self.linear.weight.data), self.linear.weight.dtype))
        return x + self.dropout(torch.tanh(self.linear(x)))


class BlockModel(toy.ToyModel):  # type: ignore[name-defined, misc]
    """The toy model with two blocks, a bias that no loss depends on, and the tied weight."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.first = nn.Linear(toy.FEATURES, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.last = nn.Linear(WIDTH, toy.FEATURES)
        self.inner = toy.ToyModel(dropout)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        x = self.first(batch["planet_params"])
        for layer in self.layers:
            x = layer(x)
        return self.inner(batch | {"planet_params": self.last(x)})


def config(strategy: str = "ddp", accumulation: int = 4, **changes: Any) -> TrainConfig:
    """23 samples in batches of 4: an epoch is 6 micro-batches, the last one of 3 samples; windows of 4 and 2.

    eps is 1e-2: with 1e-8 Adam's first step is the sign of the gradient, and a gradient of 1e-9 that is rounded
    otherwise moves its weight by the whole learning rate the other way.
    """
    base = toy.toy_config(
        epochs=2,
        data=DataConfig(batch_size=4, accumulation=accumulation),
        optimizer=OptimizerConfig(learning_rate=0.01, ema_decay=0.9, eps=1e-2),
        schedule=ScheduleConfig(name="constant"),
        distributed=DistributedConfig(strategy=strategy),
    )
    return dataclasses.replace(base, **changes)


def task_of(settings: TrainConfig, dropout: float) -> Task:
    """The toy task with the larger model."""
    made = toy.toy_task(settings)
    runtime.seed_everything(settings.seed)
    return dataclasses.replace(made, model=BlockModel(dropout))


def trained(
    settings: TrainConfig,
    folder: Path,
    world: World,
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    before: Callable[[Trainer, runtime.Interrupt], None] = lambda _trainer, _interrupt: None,
    observer: Callable[[str], None] | None = None,
) -> Trainer:
    """Train or resume in `folder`."""
    own = folder if world.main else folder / f"rank-{world.rank}"
    own.mkdir(parents=True, exist_ok=True)
    interrupt = runtime.Interrupt()
    with Monitor(own, settings.monitor) as monitor:
        run = Run(settings, torch.device("cpu"), dtype, folder, monitor, world=world)
        trainer = Trainer(task_of(settings, dropout), run, interrupt, observer=observer)
        trainer.saver.resume()
        before(trainer, interrupt)
        trainer.fit()
    return trainer


def whole(tensor: Any) -> torch.Tensor:
    """All of a shard."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Weights, averaged weights, progress."""
    average = trainer.updater.average
    return {
        "weights": {name: whole(value) for name, value in trainer.model.state_dict().items()},
        "averages": {name: whole(value) for name, value in average.averages.items()} if average else {},
        "best": trainer.progress.best,
        "updates": trainer.updater.updates,
        "skipped": trainer.updater.skipped,
        "stopped": trainer.progress.stopped,
    }


def stop_at(rank: int, world: World, batches: int) -> Callable[[Trainer, runtime.Interrupt], None]:
    """Raise the interrupt flag in one process only, while its batch number `batches` is prepared."""

    def arm(trainer: Trainer, interrupt: runtime.Interrupt) -> None:
        seen = 0

        def counting(samples: list[Any]) -> dict[str, Any]:
            nonlocal seen
            seen += 1
            if world.rank == rank and seen == batches:
                interrupt.received = "SIGTERM"
            return toy.collate(samples)

        trainer.task = dataclasses.replace(trainer.task, collate=counting)

    return arm


def equal_training(world: World, folder: Path) -> dict[str, Any]:
    """The same configuration under each strategy; accumulation 1 splits micro-batches."""
    results: dict[str, Any] = {}
    for name, settings in {
        "ddp": config(),
        "ddp split": config(accumulation=1),
        "fsdp2": config("fsdp2"),
        "fsdp2 offload": config(distributed=DistributedConfig(strategy="fsdp2", cpu_offload=True)),
        "fsdp2 once": config(distributed=DistributedConfig(strategy="fsdp2", reduce_every_round=False)),
        "fsdp2 8-bit": config("fsdp2", optimizer=EIGHT_BIT),
    }.items():
        trainer = trained(settings, folder / name, world)
        results[name] = outcome(trainer)
        if name == "fsdp2":
            results["seen"] = sorted({str(kind) for layer in trainer.model.layers for kind in layer.seen})
    return results


def mixed_precision(world: World, folder: Path) -> dict[str, Any]:
    """bf16: under FSDP2 the blocks' weights arrive in bf16, shards and gradients stay fp32."""
    results: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        settings = config(strategy, precision=PrecisionConfig(dtype="bf16"))
        trainer = trained(settings, folder / strategy, world, dtype=torch.bfloat16)
        results[strategy] = outcome(trainer) | {
            "seen": sorted({str(kind[1]) for layer in trainer.model.layers for kind in layer.seen}),
            "stored": sorted({str(value.dtype) for value in trainer.model.parameters()}),
        }
    return results


def poisoned(value: float) -> Callable[[Trainer, runtime.Interrupt], None]:
    """Give one sample of the first micro-batch, which is process 0's alone, this value."""

    def change(trainer: Trainer, _interrupt: runtime.Interrupt) -> None:
        first = next(iter(trainer.task.sampler.batches(0)))[0]
        trainer.task.train.x[first] = value  # type: ignore[attr-defined]

    return change


# Scales that move within the 4 updates of a run.
FP16 = PrecisionConfig(dtype="fp16", initial_scale=2.0**12, growth_interval=1, hysteresis=1)
# Finite, and Inf as fp16.
OVERFLOW = 1e6


def half_precision() -> dict[str, TrainConfig]:
    """fp16 runs by name; 3 epochs, so that there are 5 good updates after the bad one."""
    return {
        "ddp": config(precision=FP16, epochs=3),
        "fsdp2": config("fsdp2", precision=FP16, epochs=3),
        "fsdp2 8-bit": config("fsdp2", precision=FP16, epochs=3, optimizer=EIGHT_BIT),
    }


def fp16(world: World, folder: Path) -> dict[str, Any]:
    """A sample of process 0 overflows in fp16: both skip and halve the scale; stopped twice and resumed, to the bit."""
    results: dict[str, Any] = {}
    for name, settings in half_precision().items():

        def run(
            part: str, *befores: Any, name: str = name, settings: TrainConfig = settings
        ) -> tuple[Trainer, dict[str, Any]]:
            def before(trainer: Trainer, interrupt: runtime.Interrupt) -> None:
                for one in (poisoned(OVERFLOW), *befores):
                    one(trainer, interrupt)

            trainer = trained(settings, folder / name / part, world, dropout=0.2, dtype=torch.float16, before=before)
            scalers = world.gather(trainer.updater.scaler.state_dict())
            norms = world.gather([float(whole(value).norm()) for value in trainer.model.state_dict().values()])
            return trainer, outcome(trainer) | {"scalers": scalers, "equal": norms[0] == norms[1]}

        trainer, results[f"{name} whole"] = run("whole")
        results[f"{name} whole"]["seen"] = sorted({str(kind[1]) for one in trainer.model.layers for kind in one.seen})
        results[f"{name} whole"]["stored"] = sorted({str(value.dtype) for value in trainer.model.parameters()})
        for stop in (1, 4):
            _, results[f"{name} stop {stop}"] = run("part", stop_at(1, world, stop))
        _, results[f"{name} resumed"] = run("part")
    return results


def ragged_window(world: World, _folder: Path) -> dict[str, Any]:
    """Ragged samples of the real model, shared by the processes: the gradient and the loss of one update."""
    results: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        for share in (1.0, 0.25):
            gradients, loss = ragged.gradients(ragged.task(share), ragged.UNEVEN, world, strategy)
            results[f"{strategy} {share}"] = {"gradients": gradients, "loss": loss}
    return results


def memory(world: World, folder: Path) -> dict[str, Any]:
    """The memory report of a model whose weights outweigh the rest."""
    results: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        settings = config(strategy, epochs=1, accumulation=2)
        trainer = trained(settings, folder / strategy, world)
        if world.main:
            results[strategy] = json.loads((folder / strategy / MEMORY).read_text())
        results["parameters"] = sum(value.numel() for value in trainer.model.parameters())
    return results


def interrupted_and_resumed(world: World, folder: Path) -> dict[str, Any]:
    """A signal in process 1 only, inside an update and in validation; resumed, the run equals the uninterrupted one.

    An epoch is 3 rounds and one validation batch.
    """
    results: dict[str, Any] = {}
    for name, settings in {
        "ddp": config(),
        "fsdp2": config("fsdp2"),
        "fsdp2 8-bit": config("fsdp2", optimizer=EIGHT_BIT),
    }.items():
        results[f"{name} whole"] = outcome(trained(settings, folder / name / "whole", world, dropout=0.2))
        for stop in (1, 3):
            part = trained(settings, folder / name / "part", world, dropout=0.2, before=stop_at(1, world, stop))
            results[f"{name} stop {stop}"] = outcome(part) | {"batch": part.progress.batch}
        results[f"{name} resumed"] = outcome(trained(settings, folder / name / "part", world, dropout=0.2))
        # left for one process to go on with, and made by one process for two
        trained(settings, folder / name / "two to one", world, before=stop_at(1, world, 1))
        results[f"{name} one to two"] = outcome(trained(settings, folder / name / "one to two", world))
    return results


def bad_batch(world: World, folder: Path) -> dict[str, Any]:
    """A NaN among the samples of one process: all skip the update, and go on with equal weights."""

    result: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        settings = config(strategy, epochs=1)
        trainer = trained(settings, folder / strategy, world, before=poisoned(float("nan")))
        counts = world.gather((trainer.updater.updates, trainer.updater.skipped))
        norms = world.gather([float(whole(value).detach().norm()) for value in trainer.model.parameters()])
        result[strategy] = outcome(trainer) | {"counts": counts, "equal": norms[0] == norms[1]}
    return result


def full_disk(world: World, folder: Path) -> dict[str, Any]:
    """The disk of process 1 is full from the second save on: nobody commits, training goes on."""
    result: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        saves = 0

        def observer(stage: str) -> None:
            nonlocal saves
            saves += stage.startswith("wrote process-1.json")
            if world.rank == 1 and saves > 1:
                raise OSError(28, "No space left on device")

        settings = config(strategy, checkpoint=CheckpointConfig(every_minutes=0.0, keep=5))
        trainer = trained(settings, folder / strategy, world, observer=observer)
        names = sorted(path.name for path in (folder / strategy / "checkpoints").iterdir())
        result[strategy] = outcome(trainer) | {"names": names}
    return result


def in_background(world: World, folder: Path) -> dict[str, Any]:
    """Saves after every round, at once and in the background: `test_distributed.py` compares the files."""
    result: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2"):
        for name, asynchronous in (("at once", False), ("behind", True)):
            saving = CheckpointConfig(every_minutes=1e-9, keep=50, asynchronous=asynchronous)
            settings = config(strategy, epochs=1, checkpoint=saving)
            result[f"{strategy} {name}"] = outcome(trained(settings, folder / strategy / name, world, dropout=0.2))
    return result


def spike(world: World, folder: Path) -> dict[str, Any]:
    """The loss of process 1 is wrong once, then by its data: all compute the update again and agree on the verdict."""
    verdicts: list[Any] = []
    for strategy in ("ddp", "fsdp2"):
        for once in (True, False):
            settings = config(strategy, epochs=1, spike=SpikeConfig(rerun=True))
            calls = 0

            def broken(trainer: Trainer, _interrupt: runtime.Interrupt, once: bool = once) -> None:
                def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                    nonlocal calls
                    calls += trainer.model.training
                    wrong = world.rank == 1 and trainer.model.training and (calls == 2 if once else calls <= 4)
                    return output | {"logits": output["logits"] + float("nan")} if wrong else output

                trainer.model.register_forward_hook(hook)

            own = folder / strategy / str(once)
            trained(settings, own, world, before=broken)
            log = own if world.main else own / f"rank-{world.rank}"
            found = [record for record in read_log(log / "log.jsonl") if record["event"] == "rerun"]
            verdicts.append([strategy, once, found[0]["verdict"], found[0]["processes"]])
    return {"verdicts": [json.dumps(one) for one in world.gather(verdicts)]}


def disagreement(world: World, folder: Path) -> dict[str, Any]:
    """Processes with other settings, other data or another command: what each is told, and how soon."""
    return distributed_disagreement.told(config(), world, folder)


CASES = (
    equal_training,
    mixed_precision,
    fp16,
    ragged_window,
    memory,
    interrupted_and_resumed,
    bad_batch,
    full_disk,
    in_background,
    spike,
    disagreement,
)


def main(folder: Path) -> None:
    """Run every case; then fail in process 1 and see what process 0 is told."""
    torch.set_num_threads(1)
    with World.join(minutes=1.0, cuda=False) as world:
        for case in CASES:
            result = case(world, folder / case.__name__)
            if world.main:
                torch.save(result, folder / f"{case.__name__}.pt")
        if world.rank == 1:
            raise RuntimeError("the data of process 1 are gone")
        world.barrier()  # process 1 never comes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
