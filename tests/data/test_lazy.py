"""Climates are read when a sample is used, in bounded memory, and batches are those of reading them all at once."""

import csv
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from astrobiogen import data
from astrobiogen.data.load import SAMPLE_FOLDER, read_cube
from astrobiogen.data.storage.lazy import CubeCache, LazyEpochs
from astrobiogen.data.storage.pack import open_pack
from astrobiogen.data.text import TextEncoder, load_tokenizer
from astrobiogen.training.batches import loading

MIB = 2**20
COPIES, SAMPLES, CACHE_MIB = 4, 10_000, 32


def some(dataset: data.HabitatDataset, count: int) -> list[list[int]]:
    """``count`` batches of 4, spread over the set."""
    picks = torch.linspace(0, len(dataset) - 1, 4 * count).long().tolist()
    return [picks[k::count] for k in range(count)]


def test_loading_reads_no_climate_and_a_sample_reads_its_own() -> None:
    bundle = data.load_bundled()
    cubes = bundle.train.store.cubes
    assert cubes.reads == 0
    sample = next(s for s in bundle.train if s.metadata["epoch"] == 1)
    assert (len(sample.epochs), sample.epochs.present) == (3, (False, True, True))  # type: ignore[attr-defined]
    assert cubes.reads == 0  # not even by making a sample
    data.collate([sample])
    assert cubes.reads == 2
    data.collate([sample])
    assert cubes.reads == 2
    assert cubes.held_bytes == 2 * 2 * 12 * 10 * 32 * 64 * 4


@pytest.mark.parametrize("cache_mib", [0, 5, 256])
def test_batches_are_those_of_reading_every_climate_first(cache_mib: float) -> None:
    pack = open_pack(SAMPLE_FOLDER)
    every = {row.cube_file: read_cube(pack, row.cube_file) for row in pack.climates}
    bundle = data.load(SAMPLE_FOLDER, cache_mib=cache_mib)
    cubes = bundle.train.store.cubes
    for dataset in (bundle.train, bundle.test):
        for indices in some(dataset, 3):
            batch = data.collate([dataset[i] for i in indices])
            for row, index in enumerate(indices):
                names = dataset.store.planets[dataset.pairs[index].climate].epochs.names
                for g, name in enumerate(names):
                    wanted = torch.zeros(2, 12, 10, 32, 64) if name is None else every[name]
                    assert torch.equal(batch["climate_datacube"][row, :, :, g], wanted)
                assert batch["climate_mask"][row].tolist() == [name is not None for name in names]
            assert cubes.held_bytes <= cache_mib * MIB


def test_workers_give_the_same_batches(bundle: data.DatasetBundle) -> None:
    order = some(bundle.train, 3)
    cpu = torch.device("cpu")
    for (_, one), (_, two) in zip(
        loading.load_batches(bundle.train, data.collate, order, cpu, workers=0),
        loading.load_batches(bundle.train, data.collate, order, cpu, workers=2),
        strict=True,
    ):
        for name in ("climate_datacube", "climate_mask", "input_ids", "spectroscopy", "habitability_fraction"):
            assert torch.equal(one[name], two[name]), name
        assert torch.equal(one["metabolic_graph"].x, two["metabolic_graph"].x)


def test_texts_are_joined_when_asked_for(bundle: data.DatasetBundle) -> None:
    tokens, store = bundle.train.store.tokens, bundle.train.store
    assert len(tokens) == len(store.planets) * len(store.organisms) == sum(1 for _ in tokens)
    pair = bundle.train.pairs[7]
    encoder = TextEncoder(load_tokenizer(SAMPLE_FOLDER / "tokenizer.json"), bundle.spec.max_text_tokens)
    wanted = encoder.encode(store.planets[pair.climate].text, store.organisms[pair.organism].text)
    assert torch.equal(tokens[pair.climate, pair.organism], wanted)
    with pytest.raises(KeyError):
        tokens["nowhere", pair.organism]
    with pytest.raises(data.DataError, match=r"here: text of a, y \[text\]: holds no words"):
        encoder.encode_pairs({"a": "", "b": "rock"}, {"x": "sugar", "y": ""}, "here")


def test_the_least_recently_used_go_first() -> None:
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        if name == "bad":
            raise data.DataError("file", "field", "damaged")
        return torch.full((int(name),), 1.0)

    cache = CubeCache(read, 40)
    for name in ("4", "5", "4"):  # 16 and 20 bytes
        cache.get(name)
    assert asked == ["4", "5"]
    cache.get("3")  # 48 bytes together: "5" was used before "4" was
    assert cache.held_bytes == 28
    cache.get("4")
    assert asked == ["4", "5", "3"]
    cache.get("20")  # larger than the cache: handed out, not kept, and nothing is dropped for it
    assert (cache.held_bytes, cache.reads) == (28, 4)
    for _ in range(2):
        with pytest.raises(data.DataError, match="damaged"):
            cache.get("bad")
    assert asked[-2:] == ["bad", "bad"]
    assert LazyEpochs((None, "3"), cache)[0] is None
    with pytest.raises(IndexError):
        LazyEpochs((None, "3"), cache)[2]
    with pytest.raises(ValueError, match="cache_mib is -1, expected at least 0"):
        data.load(SAMPLE_FOLDER, cache_mib=-1)


def test_a_pickled_bundle_takes_no_climates_along(bundle: data.DatasetBundle) -> None:
    small = data.HabitatDataset(bundle.train.store, bundle.train.pairs[:1], "train")
    before = data.collate([small[0]])
    copy = pickle.loads(pickle.dumps(small))
    assert copy.store.cubes.held_bytes == 0
    assert torch.equal(data.collate([copy[0]])["climate_datacube"], before["climate_datacube"])


def test_a_file_that_changes_after_loading_is_refused(pack_copy: Path) -> None:
    bundle = data.load(pack_copy)
    path = pack_copy / "climate/earth_g1.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    epochs = bundle.train.store.planets["earth_g1"].epochs
    with pytest.raises(data.DataError, match=r"earth_g1\.bin \[sha256\]"):
        epochs[-1]
    path.write_bytes(raw)
    assert isinstance(epochs[-1], torch.Tensor)  # the fault was not remembered


def multiplied(root: Path, reseal: Callable[[Path, str], None]) -> None:
    """``COPIES`` times the climates and pairs, under new planet names."""
    manifest = json.loads((root / "manifest.json").read_text())
    for table in ("climates.csv", "pairs.csv"):
        with (root / table).open(newline="") as handle:
            reader = csv.DictReader(handle)
            rows, names = list(reader), list(reader.fieldnames or ())
        made = list(rows)
        for row in rows:
            for k in range(1, COPIES):
                planet = f"{row['planet']}x{k}"
                new = {**row, "planet": planet}
                if table == "climates.csv":
                    new["cube_file"] = f"climate/{planet}_g{row['epoch']}.bin"
                    os.link(root / row["cube_file"], root / new["cube_file"])
                    manifest["files"][new["cube_file"]] = manifest["files"][row["cube_file"]]
                made.append(new)
        with (root / table).open("w", newline="") as handle:
            writer = csv.DictWriter(handle, names)
            writer.writeheader()
            writer.writerows(made)
    (root / "manifest.json").write_text(json.dumps(manifest))
    for table in ("climates.csv", "pairs.csv"):
        reseal(root, table)


MEASURE = """
import sys
from pathlib import Path
from astrobiogen import data
from astrobiogen.training.batches import shared_items as blocks

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

root, samples, cache = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
bundle = data.load(root, cache_mib=cache)
pairs = [*bundle.train.pairs, *bundle.validation.pairs, *bundle.test.pairs]
every = data.HabitatDataset(bundle.train.store, pairs, "every pair")
start, highest, seen = resident(), 0, 0
for indices in blocks.in_blocks(every, 16, 5):
    batch = blocks.collate_shared([every[i] for i in indices], bundle.spec.pad_id)
    seen += len(indices)
    highest = max(highest, resident())
    if seen >= samples:
        break
del batch
cubes = every.store.cubes
print(seen, cubes.reads, cubes.held_bytes // 2**20, highest - start)
large = data.load(root, cache_mib=4096)
start = resident()
for planet in large.train.store.planets.values():
    planet.epochs[-1]
print(len(large.train.store.planets), resident() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory from /proc")
def test_memory_stays_bounded_over_ten_thousand_samples(pack_copy: Path, reseal: Callable[[Path, str], None]) -> None:
    multiplied(pack_copy, reseal)
    command = [sys.executable, "-c", MEASURE, str(pack_copy), str(SAMPLES), str(CACHE_MIB)]
    # glibc then gives freed tensors back at once, so that resident memory is what is in use
    malloc = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    root = Path(data.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env={**os.environ, **malloc})
    assert done.returncode == 0, done.stderr
    (seen, reads, held, grown), (climates, all_in_memory) = (
        [int(word) for word in line.split()] for line in done.stdout.splitlines()
    )
    assert seen >= SAMPLES
    assert reads > 100  # of climates that take ten times what the cache may hold
    assert held <= CACHE_MIB
    # the cache and two batches of at most 5 climates of 3 epochs of 1.9 MiB with their graphs (102 MiB were measured)
    assert grown <= CACHE_MIB + 2 * 5 * 3 * 1.9 + 40
    assert climates == 45 * COPIES
    assert all_in_memory >= 0.9 * 1.875 * climates  # the measurement sees what an unbounded cache would take
