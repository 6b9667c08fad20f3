"""A run that is stopped anywhere and resumed equals the uninterrupted run to the bit."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen.training.batches.loading import Batch
from astrobiogen.training.batches.task import Task
from astrobiogen.training.config import OptimizerConfig, PrecisionConfig, TrainConfig
from astrobiogen.training.observe.monitor import read_log
from tests.training.conftest import Run, collate, toy_config, toy_task

VOLATILE = ("time", "seconds", "speed", "checkpoint")


def final_state(run: Run) -> dict[str, torch.Tensor]:
    """Weights, averaged weights and optimizer moments by name."""
    trainer = run.trainer
    state = {f"weight.{name}": value for name, value in trainer.model.state_dict().items()}
    if trainer.updater.average:
        state |= {f"average.{name}": value for name, value in trainer.updater.average.averages.items()}
    for number, moments in enumerate(trainer.updater.optimizer.state.values()):
        state |= {
            f"moment.{number}.{name}": value for name, value in moments.items() if isinstance(value, torch.Tensor)
        }
    return state


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """Step and epoch records without clock readings."""
    records = [record for record in read_log(folder / "log.jsonl") if record["event"] in ("step", "epoch")]
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]


def stop_after(run: Run, batches: int) -> None:
    """Raise the interrupt flag while the micro-batch number `batches` (training or validation) is being prepared."""
    seen = 0

    def counting(samples: list[Any]) -> Batch:
        nonlocal seen
        seen += 1
        if seen == batches:
            run.interrupt.received = "SIGTERM"
        return collate(samples)

    run.trainer.task = dataclasses.replace(run.trainer.task, collate=counting)


# An epoch is 6 training batches (windows of 4 and 2) and 1 validation batch of 12 samples.
# 1, 2: first window; 4: just after an update; 6: end of training; 7: in validation; 9: second epoch, mid-window; 14: in
# the second validation.
@pytest.mark.parametrize("stop", [1, 2, 4, 6, 7, 9, 14, 17])
def test_resume_is_bitwise(make_run: Callable[..., Run], tmp_path: Path, stop: int) -> None:
    check_resume(make_run, tmp_path, toy_config(), torch.float32, [stop])


# bitsandbytes keeps tensors of fewer than 4,096 elements in fp32: this width gives one of 4,608 (6 x 768).
EIGHT_BIT_WIDTH = 768
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")  # on a CPU bitsandbytes' paged optimizers are the plain ones
def test_resume_is_bitwise_for_every_format_and_optimizer(
    make_run: Callable[..., Run], tmp_path: Path, dtype: str, optimizer: str
) -> None:
    """Stopped three times at random points of the 21 batches (18 training, 3 validation), dropout, accumulation and
    averaging on, loss scale moving.
    """
    config = toy_config(
        precision=PrecisionConfig(dtype=dtype, growth_interval=2),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(name=optimizer, learning_rate=0.01, ema_decay=0.9),  # type: ignore[arg-type]
    )
    generator = random.Random(f"{dtype} {optimizer}")
    stops = [generator.randrange(1, 7) for _ in range(3)]
    run = check_resume(make_run, tmp_path, config, DTYPES[dtype], stops, EIGHT_BIT_WIDTH)
    formats = {value.dtype for name, value in final_state(run).items() if name.startswith("moment.")}
    assert (torch.uint8 in formats) == (optimizer != "adamw")


def test_resume_is_bitwise_with_augmentation(make_run: Callable[..., Run], tmp_path: Path) -> None:
    def noisy(batch: Batch) -> Batch:
        return batch | {"planet_params": batch["planet_params"] + 0.1 * torch.randn(batch["planet_params"].shape)}

    check_resume(make_run, tmp_path, toy_config(), torch.float32, [3, 6], augment=noisy)


def check_resume(
    make_run: Callable[..., Run],
    tmp_path: Path,
    config: TrainConfig,
    dtype: torch.dtype,
    stops: list[int],
    width: int = 16,
    augment: Callable[[Batch], Batch] | None = None,
) -> Run:
    def task_of(config: TrainConfig) -> Task:
        return dataclasses.replace(toy_task(config, width=width), augment=augment)

    whole = make_run(config, "whole", dtype, task=task_of(config))
    assert whole.trainer.fit()
    for stop in stops:
        part = make_run(config, "part", dtype, task=task_of(config))
        part.trainer.saver.resume()
        stop_after(part, stop)
        assert not part.trainer.fit(), "the run ended before the interrupt"
        part.monitor.__exit__()
    other_seed = dataclasses.replace(config, seed=config.seed + 1)  # what is not restored would differ
    task = dataclasses.replace(task_of(other_seed), sampler=whole.trainer.task.sampler)
    resumed = make_run(config, "part", dtype, task=task)
    assert resumed.trainer.saver.resume()
    assert resumed.trainer.fit()
    expected, got = final_state(whole), final_state(resumed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert trajectory(tmp_path / "whole") == trajectory(tmp_path / "part")
    assert whole.trainer.progress.best == resumed.trainer.progress.best
    return resumed


def test_same_seed_same_bits(make_run: Callable[..., Run], tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        run = make_run(toy_config(), name)
        run.trainer.fit()
        states.append(final_state(run))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = make_run(toy_config(seed=4), "three")
    other.trainer.fit()
    assert not torch.equal(states[0]["weight.first.weight"], other.trainer.model.state_dict()["first.weight"])
    assert trajectory(tmp_path / "one") == trajectory(tmp_path / "two")
