"""Planted faults: ``check`` and the loader must name the file and the field."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from astrobiogen import data
from astrobiogen.data.__main__ import main
from astrobiogen.data.climates import cubes
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.networks.graphs import unpack_graph
from astrobiogen.data.storage.container import read_arrays, write_arrays
from astrobiogen.data.storage.pack import cube_statistics
from astrobiogen.datatools.check import check

Reseal = Callable[[Path, str], None]


def edit_csv(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    with path.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows, names = list(reader), list(reader.fieldnames or ())
    for row in rows:
        change(row)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict], None]) -> None:
    contents = read_arrays(path)
    arrays, attributes = dict(contents.arrays), dict(contents.attributes)
    change(arrays, attributes)
    maps = tuple(name for name in arrays if name in ("ta", "hus", "ts", "sic"))
    write_arrays(path, arrays, attributes, contents.array_notes, delta2=maps)


def test_bundled_pack_is_sound() -> None:
    assert check(SAMPLE_FOLDER) == []


def test_leaks_are_found(pack_copy: Path, reseal: Reseal, capsys: pytest.CaptureFixture[str]) -> None:
    def move(row: dict[str, str]) -> None:  # one epoch of a test planet into training
        if row["planet"] == "trappist1e" and row["epoch"] == "1" and row["cell"] == "new_planet":
            row["cell"] = "train"
        # and one of a validation planet
        if row["planet"] == "lp8909c" and row["epoch"] == "2" and row["cell"] == "validation":
            row["cell"] = "train"
        if row["planet"] == "earth" and row["cell"] == "train":  # validation that is not new in anything
            row["cell"] = "validation"

    edit_csv(pack_copy / "pairs.csv", move)
    reseal(pack_copy, "pairs.csv")

    spec = data.DataSpec.from_json((pack_copy / "spec.json").read_text())
    every = [read_arrays(p).arrays for p in sorted((pack_copy / "climate").glob("*.bin"))]
    raw = json.loads(spec.to_json())
    raw["cube_mean"], raw["cube_std"] = cube_statistics(every)  # statistics over all data
    (pack_copy / "spec.json").write_text(json.dumps(raw))
    reseal(pack_copy, "spec.json")

    ts, _ = cubes.read_surface(pack_copy / "surface/proximab_g1.bin", 12, 32, 64)

    def plant(
        arrays: dict[str, np.ndarray], attributes: dict
    ) -> None:  # label-segment temperature as the lowest input level
        del attributes
        arrays["ta"][:, -1] = cubes.quantise_ta(ts)

    rewrite(pack_copy / "climate/proximab_g1.bin", plant)
    reseal(pack_copy, "climate/proximab_g1.bin")

    problems = check(pack_copy)
    text = "\n".join(problems)
    assert "star systems in both new_planet and train: ['TRAPPIST-1']" in text
    assert "validation star systems in train: ['LP 890-9']" in text
    assert "validation genera in train: ['Dinoroseobacter'" in text
    assert "validation pair of system Sun and species" in text
    assert "is of no validation system or genus" in text
    assert "cube_mean or cube_std is not that of the training climates" in text
    assert "proximab_g1.bin [ta level 9]: equals the surface temperature of the label segment" in text
    assert "proximab_g1.bin [ta]: lowest-level mean" in text
    assert main(["check", str(pack_copy)]) == 1
    assert "PROBLEM split:" in capsys.readouterr().out


def test_wrong_labels_texts_and_strays_are_found(pack_copy: Path, reseal: Reseal) -> None:
    def flip(row: dict[str, str]) -> None:
        if row["planet"] == "earth" and row["epoch"] == "2":
            row["label"] = "1" if row["label"] == "0" else "0"

    edit_csv(pack_copy / "pairs.csv", flip)
    reseal(pack_copy, "pairs.csv")

    def tell(row: dict[str, str]) -> None:
        if row["organism"] == "MODEL1507180048":
            row["text"] += " Thermotoga is a thermophile."

    edit_csv(pack_copy / "organisms.csv", tell)
    reseal(pack_copy, "organisms.csv")
    (pack_copy / "extra.txt").write_text("x")
    text = "\n".join(check(pack_copy))
    assert "differ from the label segment" in text
    assert "holds label-bearing words ['thermophil']" in text
    assert "names ['thermotoga']" in text
    assert "extra.txt: is not listed" in text


@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize(
    "name", ["climate/earth_g1.bin", "metabolic/BIOMD0000001099.bin", "pairs.csv", "tokenizer.json"]
)
def test_damaged_files_are_refused(pack_copy: Path, name: str, fault: str) -> None:
    path = pack_copy / name
    raw = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        path.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    with pytest.raises(data.DataError, match=path.name):
        data.load(pack_copy)


def _drop(arrays: dict[str, np.ndarray], attributes: dict) -> None:
    del attributes, arrays["hus"]


def _shape(arrays: dict[str, np.ndarray], attributes: dict) -> None:
    del attributes
    arrays["ta"] = arrays["ta"][:6]


def _empty_level(arrays: dict[str, np.ndarray], attributes: dict) -> None:
    del attributes
    arrays["ta"][:, 3] = 0


def _segment(arrays: dict[str, np.ndarray], attributes: dict) -> None:
    del arrays
    attributes["segment"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"\[hus\]: absent"),
        (_shape, r"\[ta\]: shape"),
        (_segment, r"\[segment\]: is 2"),
    ],
)
def test_wrong_cubes_are_refused_when_loading(
    pack_copy: Path, reseal: Reseal, change: Callable[[dict[str, np.ndarray], dict], None], message: str
) -> None:
    rewrite(pack_copy / "climate/earth_g1.bin", change)
    reseal(pack_copy, "climate/earth_g1.bin")
    with pytest.raises(data.DataError, match=f"earth_g1.bin {message}"):
        data.load(pack_copy)


def _hot(arrays: dict[str, np.ndarray], attributes: dict) -> None:
    del attributes
    arrays["ta"][3, 4, 5, 6] = 9000  # 900 K


@pytest.mark.parametrize(
    ("change", "message"),
    [(_empty_level, r"\[ta\]: levels \[3\] are zero everywhere"), (_hot, r"\[ta\]: values .* lie outside")],
)
def test_wrong_values_are_refused_when_a_sample_is_used(
    pack_copy: Path, reseal: Reseal, change: Callable[[dict[str, np.ndarray], dict], None], message: str
) -> None:
    rewrite(pack_copy / "climate/earth_g1.bin", change)
    reseal(pack_copy, "climate/earth_g1.bin")
    bundle = data.load(pack_copy)
    sample = next(s for s in bundle.train if s.metadata["climate"] == "earth_g1")
    with pytest.raises(data.DataError, match=f"earth_g1.bin {message}"):
        data.collate([sample])
    assert any("earth_g1.bin [ta]" in problem for problem in check(pack_copy))


def test_wrong_units_and_empty_graph_are_refused(pack_copy: Path, reseal: Reseal) -> None:
    path = pack_copy / "climate/earth_g1.bin"
    contents = read_arrays(path)
    notes = {"ta": {"units": "degC"}, "hus": contents.array_notes["hus"]}
    write_arrays(path, contents.arrays, contents.attributes, notes, delta2=("ta", "hus"))
    reseal(pack_copy, "climate/earth_g1.bin")
    with pytest.raises(data.DataError, match=r"\[ta\]: units 'degC'"):
        data.load(pack_copy)
    graph = pack_copy / "metabolic/BIOMD0000001099.bin"
    arrays = {k: v[:0] for k, v in read_arrays(graph).arrays.items()}
    write_arrays(graph, arrays, {})
    with pytest.raises(data.DataError, match="empty graph"):
        unpack_graph(read_arrays(graph))


def test_missing_folder_and_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(data.DataError, match="folder is missing"):
        data.load(tmp_path / "nowhere")
    assert main([]) == 2
    capsys.readouterr()
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.strip() == f"error: {tmp_path / 'nowhere'}: dataset folder is missing"
    with pytest.raises(SystemExit):
        main(["check", "--raw", str(tmp_path), "--pairs", "-3"])
    assert "--pairs: got -3, expected at least 1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["describe", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.strip() == f"error: {tmp_path / 'file'}: File exists"
