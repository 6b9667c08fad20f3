"""``python -m astrobiogen.data check [DIR]``: verify a packed dataset, listing every problem.

Looks at: SHA-256 and size of each file, unlisted files, decoding, shapes, units and ranges of every cube, field and
network, split leakage, labels recomputed from the label segment, statistics recomputed from training planets, label-
segment data among the inputs, label-bearing words and names in the texts.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import labels, splits
from astrobiogen.data.climates import cubes
from astrobiogen.data.corpus import CORPUS, load_corpus
from astrobiogen.data.errors import DataError
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.networks.graphs import unpack_graph
from astrobiogen.data.storage.container import Contents
from astrobiogen.data.storage.pack import (
    BY_NAME,
    IN_SAMPLE,
    IN_TABLE,
    MANIFEST,
    PARTS,
    STATISTICS,
    Pack,
    corpus_part,
    cube_statistics,
    held_out,
    open_pack,
    param_statistics,
    parts_of,
    read_manifest,
    read_parts,
    spectrum_statistics,
    verified_bytes,
)
from astrobiogen.data.storage.tables import ClimateRow
from astrobiogen.data.text import label_words_in
from astrobiogen.datatools.progress import track

# relative, of recomputed statistics and labels: the same integers in, so only the order of sums can differ
TOLERANCE = 1e-9
FINGERPRINT_TOLERANCE = 1e-6  # K

Codes = dict[str, dict[str, NDArray[np.int16]]]


def _files(root: Path) -> Iterator[str]:
    manifest = read_manifest(root)
    for name in manifest["files"]:
        try:
            verified_bytes(root, name, manifest)
        except DataError as error:
            yield str(error)
    present = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    for name in sorted(present - set(manifest["files"]) - {MANIFEST}):
        yield str(DataError(root / name, "", "is not listed in the manifest"))


def _cubes(pack: Pack, codes: Codes) -> Iterator[str]:
    """Decode every input cube into ``codes``; compare with the segment-1 fingerprint and with the label segment's
    surface temperature.
    """
    spec = pack.spec
    shape = (spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes))
    for row in track(pack.climates, "climates", len(pack.climates), lambda r: f"{r.planet} g{r.epoch}"):
        try:
            contents = pack.contents(row.cube_file)
            found = cubes.read_codes(contents, shape)
            ts, _ = cubes.read_surface(
                pack.root / row.surface_file, spec.months, len(spec.latitudes), len(spec.longitudes)
            )
        except DataError as error:
            yield str(error)
            continue
        codes[row.cube_file] = found
        yield from _label_segment_in_input(row, contents, found["ta"], ts)


def _label_segment_in_input(
    row: ClimateRow, contents: Contents, ta: NDArray[np.int16], ts: NDArray[np.float64]
) -> Iterator[str]:
    if (contents.attributes.get("planet"), contents.attributes.get("epoch")) != (row.planet, row.epoch):
        yield str(
            DataError(
                contents.path,
                "planet/epoch",
                f"the file is of {contents.attributes}, the table says {row.planet} g{row.epoch}",
            )
        )
    mean = float(ta[:, -1].mean() * cubes.TA_STEP)
    if abs(mean - row.lowest_ta_input) > FINGERPRINT_TOLERANCE:
        yield str(
            DataError(
                contents.path,
                "ta",
                f"lowest-level mean {mean:.4f} K is not segment 1's {row.lowest_ta_input:.4f} K: leak or wrong file",
            )
        )
    for level in range(ta.shape[1]):
        if np.abs(ta[:, level] * cubes.TA_STEP - ts).max() <= cubes.TA_STEP:
            yield str(
                DataError(
                    contents.path, f"ta level {level}", "equals the surface temperature of the label segment: leak"
                )
            )


def _graphs(pack: Pack) -> Iterator[str]:
    for row in pack.organisms:
        try:
            graph = unpack_graph(pack.contents(row.graph_file))
        except DataError as error:
            yield str(error)
            continue
        if not bool(graph["x"].isfinite().all()):
            yield str(DataError(row.graph_file, "x", "non-finite features"))
        edges = graph["edge_index"].shape[1]
        if (row.metabolites + row.reactions, row.edges) != (graph.num_nodes, edges):
            yield str(
                DataError(
                    row.graph_file,
                    "size",
                    f"{graph.num_nodes} nodes, {graph['edge_index'].shape[1]} edges, the table says otherwise",
                )
            )


def _splits(pack: Pack) -> Iterator[str]:
    systems = {(c.planet, c.epoch): c.star_system for c in pack.climates}
    organisms = {o.organism: o for o in pack.organisms}
    held = held_out(pack.parts)
    rows: list[tuple[splits.PairKey, str]] = []
    wrong = 0
    for pair in pack.pairs:
        organism = organisms[pair.organism]
        key = splits.PairKey(systems[pair.planet, pair.epoch], organism.genus, organism.species)
        rows.append((key, pair.cell))
        wrong += splits.cell(key, held) != pair.cell
    yield from (f"split: {problem}" for problem in splits.leakage(rows, held))
    if wrong:
        yield f"split: {wrong} pairs are not in the cell that {PARTS} and the stated rule give"
    yield from _parts(pack)
    for planet in sorted({c.planet for c in pack.climates}):
        if len({c.star_system for c in pack.climates if c.planet == planet}) > 1:
            yield f"split: planet {planet} is listed under several star systems"


def _parts(pack: Pack) -> Iterator[str]:
    """Every star system and genus must have a part, and be where its source says."""
    listed = {(row.kind, row.name) for row in pack.parts}
    for row in parts_of(pack.climates, pack.organisms, {}):
        if (row.kind, row.name) not in listed:
            yield f"split: {row.kind} {row.name} has no part in {PARTS}"
    sample = {(row.kind, row.name): row.part for row in read_parts(SAMPLE_FOLDER / PARTS)}
    for row in pack.parts:
        expected = {BY_NAME: splits.part_by_name(row.kind, row.name), IN_SAMPLE: sample.get((row.kind, row.name)),
                    IN_TABLE: row.part}.get(row.source)  # fmt: skip
        if row.part != expected:
            yield f"split: {row.kind} {row.name} is {row.part} in {PARTS}, by its source ({row.source}) {expected}"


def _labels(pack: Pack) -> Iterator[str]:
    spec = pack.spec
    weights = labels.latitude_weights(np.array(spec.latitude_bounds))
    organisms = {o.organism: o for o in pack.organisms}
    climates = {(c.planet, c.epoch): c for c in pack.climates}
    surface: dict[tuple[str, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    wrong: list[str] = []
    for pair in pack.pairs:
        place, organism = (pair.planet, pair.epoch), organisms[pair.organism]
        if place not in surface:
            path = pack.root / climates[place].surface_file
            surface[place] = cubes.read_surface(path, spec.months, len(spec.latitudes), len(spec.longitudes))
        niche = labels.niche_fraction(*surface[place], weights, organism.niche_low, organism.niche_high)
        p_o2 = climates[place].params[spec.planet_param_names.index("p_o2")]
        s = niche * labels.gate(bool(organism.grows), bool(organism.grows_without_o2), p_o2)
        if abs(s - pair.fraction) > TOLERANCE or int(s >= spec.class_threshold) != pair.label:
            wrong.append(f"{pair.planet} g{pair.epoch} {pair.organism}: S {pair.fraction:.6f}, recomputed {s:.6f}")
    if wrong:
        yield f"labels: {len(wrong)} of {len(pack.pairs)} differ from the label segment, first {wrong[0]}"


def _differs(stored: object, recomputed: object) -> bool:
    return not np.allclose(np.array(stored), np.array(recomputed), rtol=TOLERANCE, atol=0.0, equal_nan=False)


def _statistics(pack: Pack, codes: Codes) -> Iterator[str]:
    spec = pack.spec
    fitted = sorted({p.planet for p in pack.pairs if p.cell == splits.TRAIN})
    if not fitted:
        given = open_pack(SAMPLE_FOLDER).spec
        for name in (n for n in STATISTICS if getattr(spec, n) != getattr(given, n)):
            yield f"statistics: {name} is not that of the bundled data, and there is no training pair"
        return
    if list(spec.fitted_on) != fitted:
        yield f"statistics: fitted on {list(spec.fitted_on)} by spec.json, the training planets are {fitted}"
    rows = [c for c in pack.climates if c.planet in fitted]
    if all(c.cube_file in codes for c in rows):
        mean, std = cube_statistics([codes[c.cube_file] for c in rows])
        if _differs(spec.cube_mean, mean) or _differs(spec.cube_std, std):
            yield "statistics: cube_mean or cube_std is not that of the training climates alone"
    mean, std = param_statistics(rows)
    if not np.allclose((*spec.param_mean, *spec.param_std), (*mean, *std), rtol=1e-9, atol=1e-12, equal_nan=True):
        yield "statistics: param_mean or param_std is not that of the training planets alone"
    spectra = pack.contents("spectra.bin")
    paired = {
        (key.rsplit("_g", 1)[0], int(key.rsplit("_g", 1)[1])): name
        for key, name in spectra.attributes["paired"].items()
    }
    moments = spectrum_statistics(spectra.attributes["names"], spectra.arrays["albedo"], paired, fitted)
    if _differs((spec.spectrum_mean, spec.spectrum_std), moments):
        yield "statistics: spectrum_mean or spectrum_std is not that of the spectra training may see"


def _texts(pack: Pack) -> Iterator[str]:
    for row in pack.climates:
        if words := label_words_in(row.text):
            yield f"text of {row.planet} g{row.epoch}: holds label-bearing words {words}"
    genera = {o.genus.lower() for o in pack.organisms}
    for organism in pack.organisms:
        if words := label_words_in(organism.text):
            yield f"text of {organism.organism}: holds label-bearing words {words}"
        if named := sorted(genera & set(organism.text.lower().split())):
            yield f"text of {organism.organism}: names {named}"
    for row in pack.climates:
        if not row.text.split():
            yield f"text of {row.planet} g{row.epoch}: no words"


def _inputs(pack: Pack) -> Iterator[str]:
    if pack.spec.variables != cubes.VARIABLES or pack.spec.units != cubes.UNITS:
        yield f"spec: variables {pack.spec.variables} in {pack.spec.units}, expected {cubes.VARIABLES} in {cubes.UNITS}"
    for row in pack.climates:
        if len(row.params) != pack.spec.n_planet_params or math.isnan(row.params[0]):
            yield f"climates.csv {row.planet} g{row.epoch}: {len(row.params)} parameters, stellar flux {row.params[0]}"


def _corpus(root: Path) -> Iterator[str]:
    if CORPUS not in read_manifest(root)["files"]:  # its absence is in the manifest's list of what was left out
        return
    for module in load_corpus(root):
        if module.part != corpus_part(module.module):
            yield f"corpus.jsonl.xz {module.module}: part {module.part!r}, expected {corpus_part(module.module)!r}"


def check(root: Path) -> list[str]:
    """Every problem of the pack in ``root``, empty when it is sound."""
    problems = _collect(lambda: _files(root))
    try:
        pack = open_pack(root)
    except DataError as error:
        return list(dict.fromkeys([*problems, str(error)]))
    codes: Codes = {}
    for part in (
        lambda: _inputs(pack),
        lambda: _cubes(pack, codes),
        lambda: _graphs(pack),
        lambda: _splits(pack),
        lambda: _labels(pack),
        lambda: _statistics(pack, codes),
        lambda: _texts(pack),
        lambda: _corpus(root),
    ):
        problems += _collect(part)
    return list(dict.fromkeys(problems))


def _collect(part: Callable[[], Iterator[str]]) -> list[str]:
    """Problems of one part; a ``DataError`` that ends the part becomes its last problem."""
    found: list[str] = []
    try:
        found.extend(part())
    except DataError as error:
        found.append(str(error))
    return found


def _raw(raw: Path) -> int:
    """Print what a build would leave out of ``raw``; 1 if there is anything."""
    found = importlib.import_module("astrobiogen.datatools.builders.raw_check").inspect(raw)  # needs astrobiogen[data]
    for problem in found.problems:
        sys.stdout.write(f"PROBLEM {problem}\n")
    count = len(found.problems)
    sys.stdout.write(
        f"{raw}: {found.climates} climates and {found.networks} networks can be used; "
        f"{count} problem{'' if count == 1 else 's'}; nothing was built\n"
    )
    return 1 if found.problems else 0


def main(arguments: list[str]) -> int:
    """Command line of ``check``: prints the problems; 1 if there are any, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data check",
        description="Verify a packed dataset: digests, shapes, units, ranges, leakage, labels, statistics, texts. With "
        "--raw alone: read raw files as build does, and build nothing. Every problem is a line; the exit status is 1 "
        "if there is one.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of the pack (default: the bundled one, or none with --raw)"
    )
    parser.add_argument(
        "--raw",
        type=Path,
        help="folder of raw files: what would build leave out, and why? With a pack: recompute its labels from them",
    )
    parser.add_argument("--pairs", type=int, default=20, help="how many pairs to recompute (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="which pairs to recompute (default 0)")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs: got {options.pairs}, expected at least 1")
    if options.folder is None and options.raw is not None:
        return _raw(options.raw)
    root = options.folder or SAMPLE_FOLDER
    if not root.is_dir():
        raise DataError(root, "", "dataset folder is missing")
    problems = check(root)
    if options.raw is not None and not problems:
        recompute = importlib.import_module("astrobiogen.datatools.builders.recompute")  # needs astrobiogen[data]
        problems = recompute.recomputed(open_pack(root), options.raw, options.pairs, options.seed)
    for problem in problems:
        sys.stdout.write(f"PROBLEM {problem}\n")
    if problems:
        sys.stdout.write(f"{root}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n")
        return 1
    counts = read_manifest(root).get("counts", {})
    sys.stdout.write(f"{root}: sound ({', '.join(f'{n} {what}' for what, n in counts.items())})\n")
    if options.raw is not None:
        sys.stdout.write(f"{options.pairs} pairs recomputed from {options.raw}: S and class agree exactly\n")
    return 0
