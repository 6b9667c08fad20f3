"""A resumed run is the same run: its configuration is that of the checkpoint, its data have the same content."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astrobiogen import data
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs
from astrobiogen.data.storage.pack import MANIFEST, verified_bytes
from astrobiogen.training.batches import assemble
from astrobiogen.training.config import DataConfig, OptimizerConfig, RuntimeConfig, StopConfig, TrainConfig
from astrobiogen.training.config.model import ModelChanges
from astrobiogen.training.errors import CheckpointError
from tests.training.conftest import Run, toy_config, toy_task

MakeRun = Callable[..., Run]


@pytest.fixture
def stopped(make_run: MakeRun) -> Callable[[TrainConfig], Any]:
    """`stopped(config)`: resumes, under `config`, a run of `toy_config()` that was stopped in its first epoch."""
    first = make_run(toy_config())
    first.interrupt.received = "SIGTERM"
    assert not first.trainer.fit()
    first.monitor.__exit__()

    def resume(config: TrainConfig) -> Any:
        run = make_run(config, task=toy_task(toy_config()))
        try:
            return run.trainer.saver.resume()
        finally:
            run.monitor.__exit__()

    return resume


base = toy_config()
OTHER_COURSES = {
    "data.batch_size": (4, 2, {"data": dataclasses.replace(base.data, batch_size=2)}),
    "data.accumulation": (4, 2, {"data": dataclasses.replace(base.data, accumulation=2)}),
    "optimizer.learning_rate": (0.05, 0.5, {"optimizer": dataclasses.replace(base.optimizer, learning_rate=0.5)}),
    "seed": (3, 4, {"seed": 4}),
    "epochs": (3, 5, {"epochs": 5}),
    "stop.metric": ("loss", "auroc", {"stop": StopConfig(metric="auroc")}),
    "model.kernels": (None, "reference", {"model": ModelChanges(kernels="reference")}),
}
SAME_COURSE = {
    "data.workers": {"data": dataclasses.replace(base.data, workers=1)},
    "data.path": {"data": dataclasses.replace(base.data, path="/elsewhere")},
    "runtime.malloc": {"runtime": RuntimeConfig(malloc="system")},
    "checkpoint.keep": {"checkpoint": dataclasses.replace(base.checkpoint, keep=7)},
    "monitor.log_every": {"monitor": dataclasses.replace(base.monitor, log_every=3)},
    "precision.skip_budget": {"precision": dataclasses.replace(base.precision, skip_budget=99)},
    "stop.max_hours": {"stop": StopConfig(max_hours=9.0)},
}


@pytest.mark.parametrize("key", OTHER_COURSES)
def test_another_configuration_than_the_checkpoints_is_refused_by_name(
    stopped: Callable[[TrainConfig], Any], key: str
) -> None:
    """As after an edit of config.yaml, which the command line is compared with, too: the checkpoint knows better."""
    before, after, changes = OTHER_COURSES[key]
    text = f"{key}: the checkpoint has {before!r}, asked for {after!r}"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        stopped(dataclasses.replace(base, **changes))


def test_what_changes_no_weight_may_change(stopped: Callable[[TrainConfig], Any]) -> None:
    for changes in SAME_COURSE.values():
        assert stopped(dataclasses.replace(base, **changes))


def test_what_changes_the_rounding_is_said(
    stopped: Callable[[TrainConfig], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.setLevel", lambda *_: None)  # the toy runs show errors only
    with caplog.at_level("WARNING", "astrobiogen"):
        assert stopped(dataclasses.replace(base, runtime=RuntimeConfig(threads=1)))
    assert "runtime.threads was 0 and is 1: the same training up to rounding (sums are split" in caplog.text


# ---- the data


def replaced(bundle: data.DatasetBundle, **changes: Any) -> data.DatasetBundle:
    """The bundle with a store that is changed so."""
    store = dataclasses.replace(bundle.train.store, **changes)

    def moved(samples: data.HabitatDataset) -> data.HabitatDataset:
        return data.HabitatDataset(store, samples.pairs, samples.name)

    cells = {name: moved(cell) for name, cell in bundle.test_cells.items()}
    return dataclasses.replace(bundle, train=moved(bundle.train), validation=moved(bundle.validation), test_cells=cells)


def planet(bundle: data.DatasetBundle, **changes: Any) -> data.DatasetBundle:
    """The bundle with its first training climate changed so."""
    planets = dict(bundle.train.store.planets)
    key = bundle.train.pairs[0].climate
    planets[key] = dataclasses.replace(planets[key], **changes)
    return replaced(bundle, planets=planets)


def organism(bundle: data.DatasetBundle, **changes: Any) -> data.DatasetBundle:
    """The bundle with its first training organism changed so."""
    organisms = dict(bundle.train.store.organisms)
    key = bundle.train.pairs[0].organism
    organisms[key] = dataclasses.replace(organisms[key], **changes)
    return replaced(bundle, organisms=organisms)


def swapped_climates(bundle: data.DatasetBundle) -> data.DatasetBundle:
    planets = dict(bundle.train.store.planets)
    one, other = sorted({pair.climate for pair in bundle.train.pairs})[:2]
    epochs = planets[one].epochs, planets[other].epochs
    planets[one], planets[other] = (
        dataclasses.replace(planets[one], epochs=epochs[1]),
        dataclasses.replace(planets[other], epochs=epochs[0]),
    )
    return replaced(bundle, planets=planets)


def other_values(bundle: data.DatasetBundle) -> data.DatasetBundle:
    """One value of one cube of the training set, under the same name."""
    entry = bundle.train.store.planets[bundle.train.pairs[0].climate]
    name = next(name for name in entry.epochs.names if name)

    def read(asked: str) -> torch.Tensor:
        made = entry.epochs.cubes.get(asked).clone()
        made.view(-1)[77] += 1.0 if asked == name else 0.0
        return made

    return planet(bundle, epochs=LazyEpochs(entry.epochs.names, CubeCache(read, 0)))


def flipped_test_label(bundle: data.DatasetBundle) -> data.DatasetBundle:
    cells = dict(bundle.test_cells)
    name, cell = next(iter(cells.items()))
    first = dataclasses.replace(cell.pairs[0], label=1 - cell.pairs[0].label)
    cells[name] = data.HabitatDataset(cell.store, [first, *cell.pairs[1:]], cell.name)
    return dataclasses.replace(bundle, test_cells=cells)


def reordered(bundle: data.DatasetBundle) -> data.DatasetBundle:
    train = data.HabitatDataset(bundle.train.store, bundle.train.pairs[::-1], "train")
    return dataclasses.replace(bundle, train=train)


def other_network(bundle: data.DatasetBundle) -> data.DatasetBundle:
    graph = bundle.train.store.organisms[bundle.train.pairs[0].organism].graph
    assert graph is not None
    changed = graph.clone()
    changed.stoichiometry = -changed.stoichiometry
    return organism(bundle, graph=changed)


CHANGES: dict[str, Callable[[data.DatasetBundle], data.DatasetBundle]] = {
    "climates swapped": swapped_climates,
    "one value of a climate": other_values,
    "a network replaced": other_network,
    "a network absent": lambda bundle: organism(bundle, graph=None),
    "a planet's text": lambda bundle: planet(bundle, text="edited"),
    "an organism's text": lambda bundle: organism(bundle, text="edited"),
    "a planet's parameters": lambda bundle: planet(bundle, params=torch.zeros(14)),
    "a spectrum's mask": lambda bundle: planet(bundle, spectrum_mask=torch.arange(256) < 7),
    "a star system": lambda bundle: planet(bundle, metadata={"planet": "x", "star_system": "y"}),
    "a test label": flipped_test_label,
    "rows in another order": reordered,
    "another specification": lambda bundle: replaced(
        dataclasses.replace(bundle, spec=dataclasses.replace(bundle.spec, spectrum_mean=0.5))
    ),
}


@pytest.fixture(scope="module")
def bundle() -> data.DatasetBundle:
    return data.synthetic.make_bundle(16, 0)


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_covers_the_content(bundle: data.DatasetBundle, change: str) -> None:
    assert assemble.fingerprint(CHANGES[change](bundle)) != assemble.fingerprint(bundle)


def test_the_fingerprint_is_a_function_of_the_content(bundle: data.DatasetBundle) -> None:
    assert assemble.fingerprint(data.synthetic.make_bundle(16, 0)) == assemble.fingerprint(bundle)
    assert assemble.fingerprint(replaced(bundle)) == assemble.fingerprint(bundle)
    elsewhere = dataclasses.replace(bundle, provenance={"root": "/elsewhere"})
    assert assemble.fingerprint(elsewhere) == assemble.fingerprint(bundle)


@pytest.fixture(scope="module")
def packed() -> tuple[data.DatasetBundle, str]:
    """The bundled data, and their fingerprint."""
    made = data.load_bundled()
    return made, assemble.fingerprint(made)


def test_a_pack_is_known_by_its_files_and_wherever_it_lies(
    packed: tuple[data.DatasetBundle, str], tmp_path: Path
) -> None:
    """A copy is the same data; one whose climates are swapped, files and manifest alike, is not."""
    _, known = packed
    copy = tmp_path / "copy"
    shutil.copytree(data.SAMPLE_FOLDER, copy)
    assert assemble.fingerprint(data.load(copy)) == known
    names = [f"climate/{name}_g1.bin" for name in ("earth", "proximab")]
    one, other = (copy / name for name in names)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    manifest = json.loads((copy / MANIFEST).read_text())
    files = manifest["files"]
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert verified_bytes(copy, names[1], manifest) == content
    assert assemble.fingerprint(data.load(copy)) != known


def test_the_fingerprint_of_a_pack_reads_no_climate_and_sees_what_was_changed_in_memory(
    packed: tuple[data.DatasetBundle, str],
) -> None:
    made, known = packed
    assert made.train.store.cubes.reads == 0
    assert assemble.fingerprint(other_network(made)) != known
    assert assemble.fingerprint(flipped_test_label(made)) != known
    same = made.train.store.organisms[made.train.pairs[0].organism].graph
    assert same is not None
    assert assemble.fingerprint(organism(made, graph=same)) == known


def test_other_data_than_the_checkpoints_are_refused(make_run: MakeRun) -> None:
    config = toy_config(epochs=1, data=DataConfig(batch_size=4), optimizer=OptimizerConfig(learning_rate=0.01))
    run = make_run(config)
    run.trainer.fit()
    run.monitor.__exit__()
    other = dataclasses.replace(toy_task(config), fingerprint="train 23, content of another kind")
    with pytest.raises(CheckpointError, match=r"was made with other data \(toy\) than the present \(train 23, content"):
        make_run(config, task=other).trainer.saver.resume()
