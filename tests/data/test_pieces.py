"""Sampler, collate with absent modalities, container, labels, synthetic data."""

import dataclasses
import functools
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astrobiogen import data
from astrobiogen.data import labels
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.networks.graphs import unpack_graph
from astrobiogen.data.storage.container import parse_arrays, read_arrays, write_arrays


@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 9),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_sampler_shares_and_resumes(n: int, batch: int, world: int, epoch: int, shuffle: bool) -> None:
    samplers = [data.EpochSampler(n, batch, 7, rank, world, shuffle) for rank in range(world)]
    shares = [list(s.batches(epoch)) for s in samplers]
    for sampler, share in zip(samplers, shares, strict=True):
        assert len(share) == sampler.batches_per_epoch
        assert list(sampler.batches(epoch, 2)) == share[2:]
    seen = [i for share in shares for part in share for i in part]
    assert set(seen) == set(range(n))
    if not shuffle:
        assert len(seen) == n
    else:
        assert len({len(share) for share in shares}) == 1
        assert {len(part) for share in shares for part in share} == {batch}
        whole = [list(data.EpochSampler(n, batch * world, 7).batches(epoch))]
        joined = [sorted(functools.reduce(operator.iadd, parts, [])) for parts in zip(*shares, strict=True)]
        assert joined == [sorted(part) for part in whole[0]]


def test_sampler_orders_differ_by_epoch_and_seed() -> None:
    orders = {tuple(data.EpochSampler(100, 10, seed).order(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    for bad in ({"n": 0}, {"batch_size": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            data.EpochSampler(**{"n": 4, "batch_size": 2, "seed": 0, **bad})


def test_collate_with_absent_modalities() -> None:
    bundle = data.synthetic.make_bundle(8, 0)
    full = bundle.train[0]
    nothing = dataclasses.replace(
        full,
        epochs=(None, None, None),
        graph=None,
        input_ids=torch.zeros(0, dtype=torch.long),
        spectrum_mask=torch.zeros_like(full.spectrum_mask),
        planet_params_mask=torch.zeros_like(full.planet_params_mask),
    )
    batch = data.collate([full, nothing])
    assert batch["modality_mask"][1].tolist() == [False] * 5
    assert not batch["climate_datacube"][1].any()
    assert batch["metabolic_graph"].num_graphs == 2
    assert (batch["labels"][1] == -100).all()
    alone = data.collate([nothing])
    assert tuple(alone["climate_datacube"].shape) == (1, *bundle.spec.cube_shape)
    with pytest.raises(data.DataError, match="empty list"):
        data.collate([])


def test_collate_does_not_alias_the_store() -> None:
    bundle = data.synthetic.make_bundle(4, 1)
    batch = data.collate([bundle.train[0]])
    before = bundle.train[0].epochs[-1].clone()
    batch["climate_datacube"].fill_(7.0)
    batch["metabolic_graph"].x.fill_(7.0)
    assert torch.equal(bundle.train[0].epochs[-1], before)
    assert bundle.train[0].graph.x.max() <= 1


def test_synthetic_bundle_is_named_and_repeatable() -> None:
    one, two = data.synthetic.make_bundle(30, 3), data.synthetic.make_bundle(30, 3)
    assert len(one.train) == 30
    assert one.provenance["root"] == "SYNTHETIC"
    assert torch.equal(one.train[3].epochs[-1], two.train[3].epochs[-1])
    assert len({len(cell) for cell in one.test_cells.values()}) == 1


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64"])
def test_container_round_trip(tmp_path: Path, dtype: str) -> None:
    generator = np.random.default_rng(0)
    array = (generator.random((3, 5)) * 100 - 20 * (dtype != "uint16")).astype(dtype)
    maps = generator.integers(-32768, 32767, (2, 4, 6)).astype(np.int16)
    write_arrays(tmp_path / "a.bin", {"a": array, "maps": maps, "none": array[:0]}, {"k": 1}, delta2=("maps",))
    back = read_arrays(tmp_path / "a.bin")
    for name, wanted in (("a", array), ("maps", maps), ("none", array[:0])):
        assert back.arrays[name].dtype == wanted.dtype
        np.testing.assert_array_equal(back.arrays[name], wanted)
    raw = (tmp_path / "a.bin").read_bytes()
    for cut in (4, 20, len(raw) - 3):
        (tmp_path / "cut.bin").write_bytes(raw[:cut])
        with pytest.raises(data.DataError, match=r"cut\.bin"):
            read_arrays(tmp_path / "cut.bin")


def test_a_flipped_bit_is_a_data_error_or_harmless(tmp_path: Path) -> None:
    """The digest is checked before; this is what is left when it was made anew for a damaged file."""
    raw = (SAMPLE_FOLDER / "metabolic/BIOMD0000001099.bin").read_bytes()
    header = 12 + int.from_bytes(raw[8:12], "little")
    generator = np.random.default_rng(0)
    refused = 0
    for place, bit in zip(generator.integers(0, header, 400), generator.integers(0, 8, 400), strict=True):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << bit
        try:
            unpack_graph(parse_arrays(tmp_path / "x", bytes(flipped)))
        except data.DataError:
            refused += 1
    assert refused > 300


def test_label_formula_by_hand() -> None:
    weights = labels.latitude_weights(np.array([90.0, 30.0, -90.0]))
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-12)  # sin 90 - sin 30 = 1/2 of 2
    ts = np.full((2, 2, 4), 280.15)  # 7 deg C
    sic = np.zeros_like(ts)
    assert labels.niche_fraction(ts, sic, weights, 0.0, 10.0) == pytest.approx(1.0)
    sic[:, 0] = 0.5  # the northern band is ice
    assert labels.niche_fraction(ts, sic, weights, 0.0, 10.0) == pytest.approx(0.75)
    ts[1] = 300.0  # too warm half of the time
    assert labels.niche_fraction(ts, sic, weights, 0.0, 10.0) == pytest.approx(0.375)
    assert labels.niche_fraction(np.full_like(ts, 272.0), 0 * sic, weights, -5.0, 10.0) == 0.0  # no liquid water
    assert labels.gate(True, False, 0.0) == 0.0
    assert labels.gate(True, False, 0.2) == 1.0
    assert labels.growth_range(30.0, 2, 3.0, 22.0) == (8.0, 38.0)
    assert labels.growth_range(float("nan"), 5, 3.0, 22.0) == (3.0, 22.0)
    assert labels.growth_range(float("nan"), 3, 37.0, 37.0) is None
