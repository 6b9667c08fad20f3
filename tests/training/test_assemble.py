"""Data and model as one task: batches, their order, and accumulation over ragged samples."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from astrobiogen import data
from astrobiogen.training import config, evaluation
from astrobiogen.training.batches import assemble, augmentation, shared_items, weighting
from tests.training import ragged


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


@pytest.mark.parametrize("split", [(1,) * 32, ragged.UNEVEN], ids=["1 x 32", "uneven"])
@pytest.mark.parametrize("text_share", [1.0, 0.25])
def test_accumulation_over_ragged_samples_equals_the_full_batch(split: tuple[int, ...], text_share: float) -> None:
    """The gradient that reaches the optimizer and the logged loss after a window of micro-batches, against one batch
    of 32; with a share of the texts read, too: the same ones, and micro-batches without any.
    """
    full, loss = ragged.gradients(ragged.task(text_share), [32])
    parts, same_loss = ragged.gradients(ragged.task(text_share), split)
    assert len(full) > 50
    assert ragged.apart(full, parts) < 1e-6
    assert same_loss == pytest.approx(loss, rel=1e-6)
    other, _ = ragged.gradients(ragged.task(1.25 - text_share), [32])
    assert ragged.apart(full, other) > 1e-3


def test_texts_read_are_a_function_of_seed_epoch_and_samples() -> None:
    window = tuple(range(100, 164))
    share = weighting.TextShare(0.25, seed=3)
    first = share(0, window)
    assert first is not None
    assert len(first) == 16
    assert first < set(window)
    assert first == weighting.TextShare(0.25, seed=3)(0, window)
    assert len({first, share(1, window), share(0, window[::-1]), weighting.TextShare(0.25, seed=4)(0, window)}) == 4
    assert weighting.TextShare(1.0, seed=3)(0, window) is None
    assert len(weighting.TextShare(0.01, seed=3)(0, window) or ()) == 1
    often = [len(first & (share(epoch, window) or frozenset())) for epoch in range(1, 200)]
    assert 3.5 < sum(often) / len(often) < 4.5  # independent draws of 16 of 64 share 4 on average


def test_tokens_are_those_of_the_texts_read(bundle: data.DatasetBundle) -> None:
    task = assemble.assemble(config.preset("tiny"), bundle).task
    indices = list(range(8))
    batch = task.collate([task.train[index] for index in indices])
    read = frozenset({1, 4})
    shown = weighting.reading(batch, indices, read)
    assert shown["text_rows"].tolist() == [1, 4]
    counts = assemble.TermCounts(task.train)  # type: ignore[arg-type]
    predicted = int((batch["labels"][shown["text_rows"], 1:] != -100).sum())
    assert counts(indices, read)["llm"] == predicted > 0
    assert counts(indices)["llm"] == counts(indices, frozenset(indices))["llm"] > predicted
    none = weighting.reading(batch, indices, frozenset({99}))
    assert none["text_rows"].tolist() == [0]
    assert not none["modality_mask"][:, 3].any()
    assert batch["modality_mask"][:, 3].any()


@pytest.mark.parametrize("size", [5, 32])
def test_the_validation_loss_is_that_of_all_samples_in_one_batch(size: int) -> None:
    task = ragged.task(1.0)
    result = evaluation.evaluate(
        task.model, task.loss_function, task.validation, data.collate, batch_size=size,
        device=torch.device("cpu"), counts=task.validation_counts,
    )  # fmt: skip
    assert result is not None
    batch = data.collate([task.validation[index] for index in range(32)])
    with torch.no_grad():
        loss, parts = task.loss_function(task.model(batch), batch)
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    assert result.parts == pytest.approx({name: float(value) for name, value in parts.items()}, rel=1e-6)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_every_parameter_has_a_gradient_whatever_is_absent(bundle: data.DatasetBundle, preset: str) -> None:
    """What `Task.every_parameter` says, on which DDP without a search for unused parameters rests."""
    torch.manual_seed(0)
    task = assemble.assemble(config.preset(preset), bundle).task
    assert task.every_parameter
    bare = [
        dataclasses.replace(
            sample, graph=None, epochs=(None,) * len(sample.epochs), input_ids=sample.input_ids[:0],
            spectrum_mask=torch.zeros_like(sample.spectrum_mask),
        )
        for sample in (bundle.train[0], bundle.train[1])
    ]  # fmt: skip
    batch = weighting.reading(task.collate(bare), [0, 1], frozenset({7}))
    assert int(batch["modality_mask"].sum()) == 2  # the planets' parameters
    task.loss_function(task.model.train()(batch), batch)[0].backward()
    assert [name for name, value in task.model.named_parameters() if value.grad is None] == []


def test_the_model_remembers_the_networks_of_the_training_set_only(bundle: data.DatasetBundle) -> None:
    settings = config.preset("tiny")
    assembly = assemble.assemble(settings, bundle)
    known = {pair.organism for pair in bundle.train.pairs}
    model = assembly.task.model
    assert len(model.network_summary.known) == len(known)
    loaded, _ = assemble.build_model(settings, bundle.spec)
    loaded.load_state_dict(model.state_dict())
    samples = [*bundle.train.pairs[:40], *bundle.test.pairs[:40]]
    batch = data.collate([data.HabitatDataset(bundle.train.store, samples, "some")[k] for k in range(len(samples))])
    for restored in (model, loaded):
        familiar = restored.network_summary(restored._networks(batch["metabolic_graph"]))["familiarity"]
        expected = torch.tensor([pair.organism in known for pair in samples])
        assert torch.equal(familiar == familiar.max(), expected)
        assert 0 < expected.sum() < len(samples)


def test_block_sampler_is_a_permutation_and_resumes(bundle: data.DatasetBundle) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = [
        (f"c{climate}", f"o{organism}")
        for climate in range(30)
        for organism in range(48)
        if torch.rand(1, generator=generator) < 0.7
    ]
    sampler = shared_items.BlockSampler(grid, 16, seed=1, block=5)
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
    order = shared_items.in_blocks(bundle.test, 10, 3)
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
