"""The batch type, its validation, and the named axes of cubes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astrobiogen import data
from astrobiogen.data.batches.batch import HabitatBatch, validate
from astrobiogen.data.climates import axes


@given(order=st.permutations(axes.CANONICAL))
def test_any_order_of_axes_reaches_the_canonical_one(order: list[str]) -> None:
    sizes = dict(zip(axes.CANONICAL, (2, 3, 4, 1, 5, 6, 7), strict=True))
    cube = torch.randn([sizes[name] for name in order])
    found = axes.to_canonical(cube, order)
    assert tuple(found.shape) == (2, 3, 4, 1, 5, 6, 7)
    assert found.untyped_storage().data_ptr() == cube.untyped_storage().data_ptr()
    assert torch.equal(axes.from_canonical(found, order), cube)


def test_layout_of_the_original_system() -> None:
    cube = torch.randn(2, 2, 12, 32, 64, 10)
    found = axes.to_canonical(cube)
    assert tuple(found.shape) == (2, 2, 12, 1, 10, 32, 64)
    assert found[1, 0, 5, 0, 3, 20, 40] == cube[1, 0, 5, 20, 40, 3]
    assert torch.equal(axes.from_canonical(found), cube)
    assert axes.to_canonical(cube[0], ("variable", "time", "lat", "lon", "lev")).shape[0] == 1
    for bad, message in (
        (("batch", "variable"), "has 2 names"),
        (("batch", "variable", "time", "lat", "lon", "height"), "height"),
        (("batch", "variable", "time", "lat", "lat", "lev"), "twice"),
        (("batch", "epoch", "time", "lat", "lon", "lev"), "lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            axes.to_canonical(cube, bad)
    with pytest.raises(ValueError, match="'epoch' has size 3"):
        axes.from_canonical(torch.zeros(1, 2, 12, 3, 10, 32, 64))


def changed(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(batch: dict[str, Any]) -> None:
        batch[key] = change(batch[key].clone())

    return apply


def fill(place: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(x: torch.Tensor) -> torch.Tensor:
        x[place] = value
        return x

    return apply


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        (lambda b: b.pop("labels"), "labels"),
        (lambda b: b.update(extra=1), "extra"),
        (changed("run_ids", torch.Tensor.float), "run_ids"),
        (changed("climate_datacube", lambda x: x[:, :1]), "climate_datacube"),
        (changed("climate_datacube", fill((0, 0, 0, 2, 0, 0, 0), float("nan"))), "climate_datacube"),
        (changed("planet_params", fill(0, float("inf"))), "planet_params"),
        (changed("planet_params_mask", fill((0, 0), False)), "planet_params"),
        (changed("input_ids", fill((0, 0), 10**6)), "input_ids"),
        (changed("labels", fill((0, 0), 3)), "labels"),
        (changed("habitability_label", fill(0, 2)), "habitability_label"),
        (changed("habitability_fraction", fill(0, 1.5)), "habitability_fraction"),
        (changed("graph_mask", torch.zeros_like), "modality_mask"),
        (changed("climate_mask", torch.zeros_like), "climate_datacube"),
        (changed("spectroscopy_mask", torch.zeros_like), "spectroscopy"),
    ],
)
def test_validation_names_the_key(fault: Callable[[dict[str, Any]], None], key: str) -> None:
    bundle = data.synthetic.make_bundle(12, 0)
    samples = [next(s for s in bundle.train if bool(s.spectrum_mask.any())), bundle.train[1]]
    batch = data.collate(samples)
    batch["planet_params"][0, 0] = 1.0  # so that a mask that says "absent" is a contradiction
    assert validate(batch, bundle.spec) is batch
    assert set(batch) == HabitatBatch.__required_keys__
    fault(batch)
    with pytest.raises(data.DataError, match=rf"batch \[{key}\]"):
        validate(batch, bundle.spec)


def test_near_surface_control_hides_nothing_else(bundle: data.DatasetBundle) -> None:
    hidden = data.without_near_surface(bundle.validation)
    levels = [k for k, sigma in enumerate(bundle.spec.levels) if sigma >= 0.8]
    assert levels == [7, 8, 9]
    for i in (0, len(hidden) - 1):
        before, after = bundle.validation[i], hidden[i]
        assert (before.label, before.metadata) == (after.label, after.metadata)
        assert torch.equal(before.input_ids, after.input_ids)
        for old, new in zip(before.epochs, after.epochs, strict=True):
            assert (old is None) == (new is None)
            if old is not None:
                assert not new[0][:, levels].any()
                assert torch.equal(old[1], new[1])
                assert torch.equal(old[0][:, :7], new[0][:, :7])
                assert old[0][:, levels].any()
