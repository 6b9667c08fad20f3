"""An update on ragged samples: texts of 1 to 32 tokens, absent graphs and climates, all terms of the loss on."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from astrobiogen import data
from astrobiogen.training import config
from astrobiogen.training.batches import assemble
from astrobiogen.training.batches.task import Task
from astrobiogen.training.batches.weighting import Weighting
from astrobiogen.training.distributed import World
from astrobiogen.training.distributed.model import Parallel
from astrobiogen.training.distributed.share import rounds
from astrobiogen.training.optim.optimizer import build_optimizer
from astrobiogen.training.update import Updater

SAMPLES = 32
UNEVEN = (1, 2, 3, 4, 5, 6, 7, 4)
CPU = torch.device("cpu")


@functools.cache
def _bundle() -> data.DatasetBundle:
    return data.synthetic.make_bundle(16, 0)


def task(text_share: float) -> Task:
    """The tiny preset in evaluation mode (nothing is drawn), on 32 ragged samples made of synthetic data."""
    bundle = _bundle()
    torch.manual_seed(0)
    made = assemble.assemble(config.preset("tiny"), bundle).task
    made.model.eval()
    store = bundle.train.store
    pairs = [bundle.train.pairs[number % len(bundle.train)] for number in range(SAMPLES)]
    keys = [(pair.climate, pair.organism) for pair in pairs]
    tokens = {key: torch.as_tensor(store.tokens[key]).repeat(32)[: 1 + n] for n, key in enumerate(keys)}
    organisms = dict(store.organisms)
    organisms[pairs[4].organism] = dataclasses.replace(organisms[pairs[4].organism], graph=None)
    samples = data.HabitatDataset(dataclasses.replace(store, tokens=tokens, organisms=organisms), pairs, "ragged")
    counts = assemble.TermCounts(samples)
    return dataclasses.replace(
        made, train=samples, counts=counts, validation=samples, validation_counts=counts, text_share=text_share
    )


def gradients(
    made: Task, sizes: Sequence[int], world: World | None = None, strategy: Any = "ddp"
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient that reaches the optimizer after a window of micro-batches of these sizes, and the window's loss."""
    world, model = world or World(), made.model
    ends = np.cumsum(sizes)
    order = [list(range(end - size, end)) for end, size in zip(ends.tolist(), sizes)]
    settings = dataclasses.replace(
        config.preset("tiny"),
        data=config.DataConfig(batch_size=max(sizes), accumulation=len(sizes)),
        optimizer=config.OptimizerConfig(clip_norm=0.0),
        distributed=config.DistributedConfig(strategy=strategy),
    )
    parallel = Parallel(
        model, made.loss_function, world, settings.distributed, CPU, torch.float32, made.every_parameter
    )
    optimizer = build_optimizer(model, settings.optimizer)
    seen: dict[str, torch.Tensor] = {}

    def step() -> None:
        for name, value in model.named_parameters():
            if value.grad is not None:
                seen[name] = value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad.clone()  # type: ignore[operator]

    optimizer.step = step  # type: ignore[method-assign, assignment]
    updater = Updater(parallel, optimizer, settings, 1, CPU, torch.float32)
    weighting = Weighting(made.counts, made.text_share, seed=0)
    for shared in rounds(order, 0, len(sizes), world.size):
        indices = shared.share(world.rank)
        batch = data.collate([made.train[index] for index in indices])
        updater.add(shared, *weighting(0, shared, indices, batch))
    return seen, updater.finish().means["loss"]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest distance of two gradients of a parameter, beside the norm of all."""
    assert one.keys() == other.keys()
    scale = torch.nn.utils.get_total_norm(list(one.values()))
    return max(float((other[name] - value).norm() / scale) for name, value in one.items())
