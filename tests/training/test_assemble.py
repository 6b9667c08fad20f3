"""Data and model as one task: batches, their order, and accumulation over ragged samples."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from astrobiogen import data
from astrobiogen.training import assemble, augmentation, blocks, config
from astrobiogen.training.distributed_model import Parallel
from astrobiogen.training.distributed_share import rounds
from astrobiogen.training.optimizer import build_optimizer
from astrobiogen.training.update import Updater, WindowFactors


@pytest.fixture(scope="module")
def bundle() -> Iterator[data.DatasetBundle]:
    """Synthetic data in place of the bundled data."""
    made = data.synthetic.make_bundle(16, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_bundled", lambda: made)
        yield made


def test_shared_batch_equals_the_plain_one(bundle: data.DatasetBundle) -> None:
    torch.manual_seed(0)
    assembly = assemble.assemble(config.preset("tiny"), bundle)
    model = assembly.task.model.eval()
    samples = [bundle.train[index] for index in next(iter(assembly.task.sampler.batches(0)))]
    plain, shared = data.collate(samples), assembly.task.collate(samples)
    assert len(shared["climate_datacube"]) < len(samples)
    assert torch.equal(plain["modality_mask"], shared["modality_mask"])
    with torch.no_grad():
        expected, got = (assembly.task.loss_function(model(batch), batch) for batch in (plain, shared))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [[1] * 32, [1, 2, 3, 4, 5, 6, 7, 4]], ids=["1 x 32", "uneven"])
def test_accumulation_over_ragged_samples_equals_the_full_batch(bundle: data.DatasetBundle, split: list[int]) -> None:
    """Texts of 1 to 32 tokens and an absent graph, all terms on: the gradient that reaches the optimizer after a window
    of micro-batches against one batch of 32.
    """
    torch.manual_seed(0)
    task = assemble.assemble(config.preset("tiny"), bundle).task
    model = task.model.eval()
    pairs = [bundle.train.pairs[number % len(bundle.train)] for number in range(32)]
    store = bundle.train.store
    keys = [(pair.climate, pair.organism) for pair in pairs]
    tokens = {key: torch.as_tensor(store.tokens[key]).repeat(32)[: 1 + n] for n, key in enumerate(keys)}
    organisms = dict(store.organisms)
    organisms[pairs[4].organism] = dataclasses.replace(organisms[pairs[4].organism], graph=None)
    ragged = data.HabitatDataset(dataclasses.replace(store, tokens=tokens, organisms=organisms), pairs, "ragged")

    def gradients(sizes: list[int]) -> dict[str, torch.Tensor]:
        ends = np.cumsum(sizes)
        order = [list(range(end - size, end)) for end, size in zip(ends, sizes)]
        settings = dataclasses.replace(
            config.preset("tiny"),
            data=config.DataConfig(batch_size=max(sizes), accumulation=len(sizes)),
            optimizer=config.OptimizerConfig(clip_norm=0.0),
        )
        optimizer = build_optimizer(model, settings.optimizer)
        seen: dict[str, torch.Tensor] = {}

        def step() -> None:
            seen.update(
                {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
            )

        optimizer.step = step  # type: ignore[method-assign, assignment]
        place = torch.device("cpu")
        updater = Updater(Parallel.alone(model, task.loss_function), optimizer, settings, 1, place, torch.float32)
        factors = WindowFactors(functools.partial(assemble.term_counts, ragged))
        for shared in rounds(order, 0, len(sizes), 1):
            indices = shared.share(0)
            batch = data.collate([ragged[index] for index in indices])
            updater.add(shared, batch, factors(shared, indices))
        updater.finish()
        return seen

    full, parts = gradients([32]), gradients(split)
    scale = torch.nn.utils.get_total_norm(list(full.values()))
    assert len(full) > 50
    for name, value in full.items():
        assert float((parts[name] - value).norm() / scale) < 1e-6, name


def test_block_sampler_is_a_permutation_and_resumes(bundle: data.DatasetBundle) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = [
        (f"c{climate}", f"o{organism}")
        for climate in range(30)
        for organism in range(48)
        if torch.rand(1, generator=generator) < 0.7
    ]
    sampler = blocks.BlockSampler(grid, 16, seed=1, block=5)
    epochs = [list(sampler.batches(epoch)) for epoch in range(2)]
    for batches in epochs:
        assert len(batches) == sampler.batches_per_epoch
        assert sorted(index for batch in batches for index in batch) == list(range(len(grid)))
        assert all(len(batch) == 16 for batch in batches if len(batch) != len(grid) % 16)
    assert epochs[0] != epochs[1]
    assert epochs[0] == list(sampler.batches(0))
    assert list(sampler.batches(1, start=7)) == epochs[1][7:]
    climates = [len({grid[index][0] for index in batch}) for batch in epochs[0]]
    assert sum(climates) / len(climates) < 7  # a random batch of 16 would have about 12
    order = blocks.in_blocks(bundle.test, 10, 3)
    assert sorted(index for batch in order for index in batch) == list(range(len(bundle.test)))


def test_rolled_longitudes_change_no_budget_and_are_drawn_from_the_saved_generator(bundle: data.DatasetBundle) -> None:
    settings = dataclasses.replace(config.preset("tiny"), data=config.DataConfig(roll_longitude=True))
    torch.manual_seed(0)
    task = assemble.assemble(settings, bundle).task
    assert task.augment is augmentation.roll_longitude
    batch = task.collate([task.train[index] for index in next(iter(task.sampler.batches(0)))])
    state = torch.get_rng_state()
    turned, cube = task.augment(batch)["climate_datacube"], batch["climate_datacube"]
    assert not torch.equal(turned, cube)
    torch.set_rng_state(state)
    assert torch.equal(task.augment(batch)["climate_datacube"], turned)
    torch.set_rng_state(state)
    shifts = torch.randint(cube.shape[-1], (len(cube),)).tolist()
    assert len(set(shifts)) > 1
    for one, other, shift in zip(turned, cube, shifts, strict=True):
        assert torch.equal(one, other.roll(shift, -1))
    expected, got = (task.model.climate.budgets.budgets(field) for field in (cube, turned))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0.0)


def test_limit_spreads_over_the_set(bundle: data.DatasetBundle) -> None:
    cut = assemble.load_bundle(dataclasses.replace(config.preset("tiny"), data=config.DataConfig(limit=6)))
    assert len(cut.train) == 6
    assert all(len(cell) <= 2 for cell in cut.test_cells.values())
    assert cut.train.pairs[-1] != bundle.train.pairs[5]
