"""The bundled dataset: documented shapes, masks, splits, sizes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from astrobiogen import data
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.networks.features import FEATURE_NAMES
from astrobiogen.data.text import label_words_in
from astrobiogen.datatools import __name__ as builders_name

HEAVY = ("xarray", "netCDF4", "libsbml", "scipy.optimize", "matplotlib", builders_name)


def test_pack_is_small_and_complete(bundle: data.DatasetBundle) -> None:
    size = sum(p.stat().st_size for p in SAMPLE_FOLDER.rglob("*") if p.is_file())
    assert size <= 24 * 2**20
    assert len(bundle.train.store.planets) == 45
    assert len(bundle.train.store.organisms) >= 64
    total = len(bundle.train) + len(bundle.validation) + len(bundle.test)
    assert total == 45 * len(bundle.train.store.organisms)
    assert set(bundle.test_cells) == {"seen", "new_planet", "new_organism", "new_both"}
    assert len(bundle.test) == sum(map(len, bundle.test_cells.values()))


def test_both_classes_in_every_cell(bundle: data.DatasetBundle) -> None:
    for part in (bundle.train, bundle.validation, *bundle.test_cells.values()):
        share = part.labels().float().mean().item()
        assert 0.2 < share < 0.8, part.name
        expected = part.fractions() >= bundle.spec.class_threshold
        assert torch.equal(part.labels().bool(), expected), part.name


def test_held_out_names_are_in_no_training_pair(bundle: data.DatasetBundle) -> None:
    def names(part: data.HabitatDataset) -> tuple[set[str], set[str]]:
        store = part.store
        return (
            {store.planets[pair.climate].metadata["star_system"] for pair in part.pairs},
            {store.organisms[pair.organism].metadata["genus"] for pair in part.pairs},
        )

    systems, genera = names(bundle.train)
    assert "Sun" in systems  # the only planet with land, oxygen and spectra
    for cell in ("new_planet", "new_both"):
        assert systems.isdisjoint(names(bundle.test_cells[cell])[0])
        assert names(bundle.validation)[0].isdisjoint(names(bundle.test_cells[cell])[0])
    for cell in ("new_organism", "new_both"):
        assert genera.isdisjoint(names(bundle.test_cells[cell])[1])
        assert names(bundle.validation)[1].isdisjoint(names(bundle.test_cells[cell])[1])
    new = [
        (pair.metadata["star_system"] not in systems, pair.metadata["genus"] not in genera)
        for pair in bundle.validation
    ]
    assert all(planet or organism for planet, organism in new)
    for kind in ((True, False), (False, True), (True, True)):
        assert new.count(kind) >= 30, kind


def test_batch_layout(bundle: data.DatasetBundle) -> None:
    b, spec = 6, bundle.spec
    picks = torch.linspace(0, len(bundle.train) - 1, b).long().tolist()
    batch = data.collate([bundle.train[i] for i in picks])
    p, w = spec.n_planet_params, spec.n_wavelengths
    length = batch["input_ids"].shape[1]
    layout = {
        "run_ids": ((b,), torch.long),
        "planet_params": ((b, p), torch.float32),
        "planet_params_mask": ((b, p), torch.bool),
        "climate_datacube": ((b, 2, 12, 3, 10, 32, 64), torch.float32),
        "climate_mask": ((b, 3), torch.bool),
        "graph_mask": ((b,), torch.bool),
        "spectroscopy": ((b, w, 2), torch.float32),
        "spectroscopy_mask": ((b, w), torch.bool),
        "input_ids": ((b, length), torch.long),
        "attention_mask": ((b, length), torch.bool),
        "labels": ((b, length), torch.long),
        "habitability_label": ((b,), torch.long),
        "habitability_fraction": ((b,), torch.float32),
        "modality_mask": ((b, 5), torch.bool),
    }
    for name, (shape, dtype) in layout.items():
        assert tuple(batch[name].shape) == shape, name
        assert batch[name].dtype == dtype, name
        assert not batch[name].is_floating_point() or bool(batch[name].isfinite().all()), name
    assert length <= spec.max_text_tokens
    assert int(batch["input_ids"].max()) < spec.vocab_size
    assert torch.equal(batch["labels"] == -100, ~batch["attention_mask"])
    assert torch.equal(batch["labels"][batch["attention_mask"]], batch["input_ids"][batch["attention_mask"]])
    assert len(batch["metadata"]) == len(batch["text_description"]) == b
    assert set(batch) == set(layout) | {"metabolic_graph", "metadata", "text_description"}


def test_batches_of_every_cell_are_valid(bundle: data.DatasetBundle) -> None:
    for part in (bundle.train, bundle.validation, *bundle.test_cells.values()):
        picks = torch.linspace(0, len(part) - 1, 3).long().tolist()
        batch = data.collate([part[i] for i in picks])
        assert data.validate(batch, bundle.spec) is batch
        assert [item["cell"] for item in batch["metadata"]] == [part.pairs[i].cell for i in picks]
        batch["planet_params"][0, 0] = torch.nan
        with pytest.raises(data.DataError, match="planet_params"):
            data.validate(batch, bundle.spec)


def test_epochs_are_aligned_at_the_end_and_never_repeated(bundle: data.DatasetBundle) -> None:
    planets = bundle.train.store.planets
    for key in ("earth_g0", "earth_g1", "earth_g2"):
        epoch = int(key[-1])
        pair = next(i for i, p in enumerate(bundle.train.pairs) if p.climate == key)
        batch = data.collate([bundle.train[pair]])
        assert batch["climate_mask"][0].tolist() == [epoch >= 2, epoch >= 1, True]
        for g in range(3):
            cube = batch["climate_datacube"][0, :, :, g]
            wanted = epoch - 2 + g
            if wanted < 0:
                assert not cube.any()
            else:
                assert torch.equal(cube, planets[f"earth_g{wanted}"].epochs[-1])


def test_training_statistics_are_zero_and_one(bundle: data.DatasetBundle) -> None:
    fitted = [p for p in bundle.train.store.planets.values() if p.metadata["planet"] in bundle.spec.fitted_on]
    cube = torch.stack([p.epochs[-1] for p in fitted]).double()
    # float32 storage of up to 2e7 standardised values of size <= 30: mean error below 1e-5
    torch.testing.assert_close(cube.mean((0, 2, 4, 5)), torch.zeros(2, 10, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(cube.std((0, 2, 4, 5)), torch.ones(2, 10, dtype=torch.float64), atol=1e-4, rtol=0)
    systems = {p.metadata["star_system"] for p in fitted}
    for cell in ("new_planet", "new_both"):
        assert systems.isdisjoint(s.metadata["star_system"] for s in bundle.test_cells[cell])


def test_graphs_are_bipartite_networks(bundle: data.DatasetBundle) -> None:
    for name, entry in bundle.train.store.organisms.items():
        graph = entry.graph
        assert graph is not None
        kind = graph.node_type
        assert graph.x.shape[1] == len(FEATURE_NAMES) == 64
        source, target = graph.edge_index
        assert bool((kind[source] != kind[target]).all()), name
        substrate = kind[source] == 0
        assert torch.equal(substrate, graph.stoichiometry < 0), name
        assert torch.equal(graph.x[:, 1].long(), kind)
        assert bool(graph.x.isfinite().all())
        assert graph.x.abs().max() < 14, name
        assert not bool(graph.is_internal[kind == 1].any())
        assert bool(graph.is_internal.any())
        assert graph.laplacian_pe.abs().max() <= 1
        assert bool(((graph.random_walk_pe >= 0) & (graph.random_walk_pe <= 1)).all())


def test_texts_hold_no_names_or_label_words(bundle: data.DatasetBundle) -> None:
    store = bundle.train.store
    genera = {o.metadata["genus"].lower() for o in store.organisms.values()}
    for entry in (*store.planets.values(), *store.organisms.values()):
        assert label_words_in(entry.text) == []
        assert genera.isdisjoint(entry.text.lower().split())
    for planet in store.planets.values():
        assert (
            planet.metadata["planet"][:5] not in planet.text.lower().replace(" ", "") or "earth" in planet.text.lower()
        )


def test_spectra_only_where_they_exist(bundle: data.DatasetBundle) -> None:
    have = {k for k, p in bundle.train.store.planets.items() if bool(p.spectrum_mask.any())}
    assert have == {"earth_g0", "earth_g2"}


def test_second_load_is_identical(bundle: data.DatasetBundle) -> None:
    again = data.load_bundled()
    assert list(again.train.pairs) == list(bundle.train.pairs)
    assert torch.equal(again.train[5].epochs[-1], bundle.train[5].epochs[-1])
    assert torch.equal(again.train[5].input_ids, bundle.train[5].input_ids)


def test_baseline_features(bundle: data.DatasetBundle) -> None:
    params, flat, labels, fractions = data.baseline_features(bundle.validation)
    n = len(bundle.validation)
    assert params.shape == (n, bundle.spec.n_planet_params)
    assert flat.shape[0] == n
    assert labels.tolist() == bundle.validation.labels().tolist()
    assert np.isfinite(params).all()
    assert np.isfinite(flat).all()
    assert ((fractions >= bundle.spec.class_threshold) == labels.astype(bool)).all()
    # no column may be the label in disguise
    spread = flat.std(axis=0) > 0
    centred = flat[:, spread] - flat[:, spread].mean(axis=0)
    correlation = centred.T @ (fractions - fractions.mean()) / (n * flat[:, spread].std(axis=0) * fractions.std())
    assert np.abs(correlation).max() < 0.95


def test_spec_round_trip(bundle: data.DatasetBundle) -> None:
    assert data.DataSpec.from_json(bundle.spec.to_json()) == bundle.spec
    with pytest.raises(data.DataError, match="months"):
        data.DataSpec.from_json(bundle.spec.to_json().replace('"months": 12', '"months": "12"'))
    with pytest.raises(data.DataError, match="unknown field"):
        data.DataSpec.from_json(bundle.spec.to_json().replace('"months"', '"moons"'))


def test_loading_imports_no_builder_package() -> None:
    code = f"import sys, astrobiogen.data; print([m for m in {HEAVY!r} if m in sys.modules])"
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_corpus() -> None:
    modules = data.load_corpus()
    assert len(modules) == 185
    assert 0.02 < sum(m.part == "validation" for m in modules) / len(modules) < 0.25


def test_acceptance_filters_climates_and_their_history() -> None:
    balanced = data.load(SAMPLE_FOLDER, max_toa_imbalance=2.0, max_ts_drift=2.0)
    assert set(balanced.train.store.planets) == {"earth_g1", "earth_g2"}
    epochs = balanced.train.store.planets["earth_g2"].epochs
    assert [e is not None for e in epochs] == [False, True, True]
    assert {p.climate for p in (*balanced.train.pairs, *balanced.test.pairs)} <= {"earth_g1", "earth_g2"}
    with pytest.raises(data.DataError, match=r"\[acceptance\]: no climate is within"):
        data.load(SAMPLE_FOLDER, max_toa_imbalance=0.0)


def test_describe_writes_every_plot_of_the_card(tmp_path: Path) -> None:
    root = Path(data.__file__).parents[2]
    run = tmp_path / "work/x_g0"
    run.mkdir(parents=True)
    (run / "job.json").write_text('{"steps": 5760, "timestep": 45.0}')
    (run / "history.json").write_text('[{"toa_imbalance": -9.0, "ts_mean": 250.0}]')
    command = [sys.executable, "-m", "astrobiogen.data", "describe", "--output", str(tmp_path)]
    command += ["--climate-work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "## Split cells" in done.stdout
    card = (root / "docs/data.md").read_text()
    for path in (root / "docs/data").glob("*.png"):
        assert (tmp_path / path.name).stat().st_size > 10_000
        assert f"data/{path.name}" in card


def test_a_model_reads_other_data_by_its_own_statistics(
    bundle: data.DatasetBundle, pack_copy: Path, reseal: Callable[[Path, str], None]
) -> None:
    kept = json.loads(json.dumps(bundle.statistics()))  # as a checkpoint holds them
    spec = json.loads((pack_copy / "spec.json").read_text())
    for name in ("cube_mean", "param_mean"):
        spec[name] = (np.array(spec[name]) * 1.1 + 0.3).tolist()
    spec["spectrum_mean"] += 0.1
    (pack_copy / "spec.json").write_text(json.dumps(spec))
    tokenizer = json.loads((pack_copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (pack_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("spec.json", "tokenizer.json"):
        reseal(pack_copy, name)
    picks = [0, 300, 700]
    expected = data.collate([bundle.train[i] for i in picks])
    own, ours = (data.load(pack_copy, statistics=s) for s in (None, kept))
    assert ours.spec == bundle.spec
    found, other = (data.collate([b.train[i] for i in picks]) for b in (ours, own))
    for name in ("climate_datacube", "planet_params", "spectroscopy", "input_ids"):
        assert torch.equal(found[name], expected[name]), name
        assert other[name].shape != expected[name].shape or not torch.equal(other[name], expected[name]), name
    wrong = {
        "levels": {**kept, "spec": {**kept["spec"], "levels": kept["spec"]["levels"][:-1]}},
        "units": {**kept, "spec": {**kept["spec"], "units": ["degC", "kg kg-1"]}},
        "tokenizer": {"spec": kept["spec"]},
        "cube_mean": {**kept, "spec": {k: v for k, v in kept["spec"].items() if k != "cube_mean"}},
    }
    for field, statistics in wrong.items():
        with pytest.raises(data.DataError, match=rf"\[{field}\]"):
            data.load(pack_copy, statistics=statistics)
    with pytest.raises(data.DataError, match="is not a tokenizer"):
        data.load(pack_copy, statistics={**kept, "tokenizer": {}})
