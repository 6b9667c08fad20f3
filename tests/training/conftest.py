"""A small stand-in for data and model with the trainer's interfaces: fast, learnable, with dropout and ragged masks."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from astrobiogen.training import context
from astrobiogen.training.batches.task import Task
from astrobiogen.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MonitorConfig,
    OptimizerConfig,
    TrainConfig,
)
from astrobiogen.training.distributed import runtime
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.trainer import Trainer

FEATURES = 6


class ToySamples:
    """`count` samples whose label is a noisy linear function of a vector; 4 planets x 5 organisms."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator)
        noise = 0.3 * torch.randn(count, generator=generator)
        self.y = (self.x[:, 0] - self.x[:, 1] + noise > 0).long()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.x[index], self.y[index], index


def collate(samples: list[tuple[torch.Tensor, torch.Tensor, int]]) -> dict[str, Any]:
    """The batch keys that the trainer and the evaluation touch."""
    size = len(samples)
    label = torch.stack([sample[1] for sample in samples])
    return {
        "planet_params": torch.stack([sample[0] for sample in samples]),
        "planet_params_mask": torch.ones(size, FEATURES, dtype=torch.bool),
        "climate_datacube": torch.zeros(size, 1),
        "climate_mask": torch.ones(size, 1, dtype=torch.bool),
        "graph_mask": torch.ones(size, dtype=torch.bool),
        "spectroscopy": torch.zeros(size, 1, 2),
        "spectroscopy_mask": torch.ones(size, 1, dtype=torch.bool),
        "attention_mask": torch.ones(size, 2, dtype=torch.bool),
        "labels": torch.zeros(size, 2, dtype=torch.long),
        "modality_mask": torch.ones(size, 5, dtype=torch.bool),
        "habitability_label": label,
        "habitability_fraction": label.float(),
        "metadata": [
            {"planet": f"p{sample[2] % 4}", "organism": f"o{sample[2] % 5}", "cell": f"c{sample[2] % 2}"}
            for sample in samples
        ],
    }


class ToySampler:
    """Order as a function of (seed, epoch) only."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.batches_per_epoch = -(-count // batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        for number in range(start, self.batches_per_epoch):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]


class ToyModel(nn.Module):
    """Two layers, dropout, a tied weight and a fusion weight per modality."""

    def __init__(self, dropout: float = 0.2, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)
        self.tied = nn.Linear(width, 2)
        self.tied.weight = self.head.weight
        self.dropout = nn.Dropout(dropout)
        self.mixing = nn.Parameter(torch.zeros(5))

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        present = batch["modality_mask"][:, 4:].to(batch["planet_params"].dtype)
        hidden = self.dropout(torch.tanh(self.norm(self.first(batch["planet_params"] * present))))
        logits = self.head(hidden) + 0.1 * self.tied(hidden)
        weights = self.mixing.softmax(0).expand(len(logits), 5)
        return {"logits": logits, "regression": logits.softmax(-1)[:, 1] * weights.sum(-1), "modality_weights": weights}


def toy_loss(outputs: dict[str, Any], batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy plus a squared error, both means over the batch."""
    classification = nn.functional.cross_entropy(outputs["logits"].float(), batch["habitability_label"])
    regression = (outputs["regression"].float() - batch["habitability_fraction"]).square().mean()
    loss = classification + 0.5 * regression
    return loss, {"classification": classification.detach(), "regression": regression.detach()}


def toy_config(**changes: Any) -> TrainConfig:
    """Quick configuration: 23 samples in batches of 4 (the last one short), windows of 4 (the last one of 2)."""
    base = TrainConfig(
        seed=3,
        epochs=3,
        data=DataConfig(batch_size=4, accumulation=4),
        optimizer=OptimizerConfig(learning_rate=0.05, ema_decay=0.9),
        checkpoint=CheckpointConfig(every_minutes=0.0),
        monitor=MonitorConfig(progress="plain", level="ERROR"),
        evaluation=EvaluationConfig(bootstrap=20),
    )
    return dataclasses.replace(base, **changes)


def toy_task(config: TrainConfig, dropout: float = 0.2, train_samples: int = 23, width: int = 16) -> Task:
    """Seeds everything, then builds the task."""
    runtime.seed_everything(config.seed)
    model = ToyModel(dropout, width)
    train = ToySamples(train_samples, seed=1)
    sampler = ToySampler(len(train), config.data.batch_size, config.seed)
    return Task(model, toy_loss, train, ToySamples(12, seed=2), sampler, collate, "toy")


@dataclasses.dataclass
class Run:
    """A trainer in a folder, with what it needs to stop."""

    trainer: Trainer
    interrupt: runtime.Interrupt
    monitor: Monitor


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`make_run(config, name="run", dtype=..., task=..., observer=...)`: a trainer in `tmp_path / name`."""
    monitors: list[Monitor] = []

    def build(
        config: TrainConfig,
        name: str = "run",
        dtype: torch.dtype = torch.float32,
        task: Task | None = None,
        observer: Any = None,
    ) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monitor = Monitor(folder, config.monitor)
        monitor.__enter__()
        monitors.append(monitor)
        interrupt = runtime.Interrupt()
        trainer = Trainer(
            task or toy_task(config),
            context.Run(config, torch.device("cpu"), dtype, folder, monitor),
            interrupt,
            observer=observer,
        )
        return Run(trainer, interrupt, monitor)

    yield build
    for monitor in reversed(monitors):
        monitor.__exit__(None, None, None)
