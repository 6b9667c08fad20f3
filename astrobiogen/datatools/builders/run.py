"""``python -m astrobiogen.data build --raw DIR``: raw files to a packed dataset.

Order of the work: climates, networks, texts and spectra, splits, statistics and tokenizer (training part only), pairs,
manifest. A file that cannot be used is left out, or what it would say is masked, and it is listed at the end with the
reason; equal input gives equal bytes on one machine.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import labels, splits
from astrobiogen.data.climates import cubes
from astrobiogen.data.errors import DataError
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.networks.graphs import LAPLACIAN_DIM, RANDOM_WALK_DIM
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.storage import pack
from astrobiogen.data.storage.container import write_arrays
from astrobiogen.data.storage.tables import ClimateRow, OrganismRow, PairRow, PartRow, write_rows
from astrobiogen.data.text import BOS, EOS, MAX_TEXT_TOKENS, PAD, SEP, VOCAB_SIZE
from astrobiogen.datatools.builders import spectra, text
from astrobiogen.datatools.builders.climates import build_climates
from astrobiogen.datatools.builders.organisms import build_networks
from astrobiogen.datatools.builders.work import Work, digest
from astrobiogen.datatools.climates import planets
from astrobiogen.datatools.climates.grids import Grid
from astrobiogen.datatools.progress import say
from astrobiogen.system import staging

N_EPOCHS = 3
OUTPUT = Path("datasets/habitat")
CORPUS_FILE = "openstax_astronomy2e_ccby_63157f3.jsonl.gz"
Library = tuple[list[str], NDArray[np.float32], dict[tuple[str, int], str]]


def placed(raw: Path) -> dict[tuple[str, str], PartRow]:
    """Star systems and genera that have their part already, by (kind, name): those of the bundled sample keep it, and
    the raw folder's ``tables/split.csv`` (kind, name, part) stands above all.

    Raises:
        DataError: That table cannot be read or names an unknown kind or part: a build with another split than asked for
            would be worse than none.
    """
    known = {(row.kind, row.name): row for row in pack.read_parts(SAMPLE_FOLDER / pack.PARTS)}
    known = {key: replace(row, source=pack.IN_SAMPLE) for key, row in known.items()}
    own = raw / "tables" / pack.PARTS
    if own.exists():
        known |= {(row.kind, row.name): replace(row, source=pack.IN_TABLE) for row in pack.read_parts(own)}
    return known


def build_pairs(
    output: Path,
    climates: list[ClimateRow],
    organisms: list[OrganismRow],
    parts: tuple[PartRow, ...],
    grid: Grid,
) -> list[PairRow]:
    """Label and split every (climate, organism)."""
    held = pack.held_out(parts)
    weights = labels.latitude_weights(pack.latitude_bounds(grid.latitudes))
    done: list[PairRow] = []
    for place in climates:
        ts, sic = cubes.read_surface(
            output / place.surface_file, grid.months, len(grid.latitudes), len(grid.longitudes)
        )
        p_o2 = place.params[planets.PARAM_NAMES.index("p_o2")]
        for organism in organisms:
            niche = labels.niche_fraction(ts, sic, weights, organism.niche_low, organism.niche_high)
            opened = labels.gate(bool(organism.grows), bool(organism.grows_without_o2), p_o2)
            s = niche * opened
            key = splits.PairKey(place.star_system, organism.genus, organism.species)
            cell = splits.cell(key, held)
            done.append(
                PairRow(
                    place.planet,
                    place.epoch,
                    organism.organism,
                    s,
                    niche,
                    opened,
                    int(s >= labels.CLASS_THRESHOLD),
                    cell,
                )
            )
    return done


def build_spectra(work: Work, climates: list[ClimateRow], psg_tables: bool) -> Library:
    """Pack the albedo library and the PSG spectra of climates (``spectra/psg/<planet>_g<epoch>.txt``), with
    ``psg_tables`` also the spectra of no climate in ``spectra/psg/*.parquet``; returns names, albedo [n, 256] and which
    climate has which.
    """
    keys = {f"{c.planet}_g{c.epoch}": (c.planet, c.epoch) for c in climates}
    paired = {place: name for place, name in spectra.PAIRED.items() if place in keys.values()}
    rows: dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
    for name, (file, _, _) in spectra.LIBRARY.items():
        with work.tolerated("spectrum left out"):
            rows[name] = spectra.read_spectrum(work.raw / "spectra/vpl", name)
            work.record("spectra.bin", work.raw / "spectra/vpl" / file)
    for path in sorted((work.raw / "spectra/psg").glob("*_g?.txt")):
        with work.tolerated("spectrum left out"):
            if path.stem not in keys:
                raise DataError(path, "", "is named after no climate of this build")
            rows[path.stem] = spectra.read_psg(path)
            paired[keys[path.stem]] = path.stem
            work.record("spectra.bin", path)
    for path in sorted((work.raw / "spectra/psg").glob("*.parquet")) if psg_tables else ():
        with work.tolerated("table of spectra left out"):
            rows |= spectra.read_psg_table(path)
            work.record("spectra.bin", path)
    paired = {place: name for place, name in paired.items() if name in rows}
    albedo = np.array([a for a, _ in rows.values()], np.float32).reshape(len(rows), spectra.BINS)
    mask = np.array([m for _, m in rows.values()], bool).reshape(len(rows), spectra.BINS)
    attributes = {"names": list(rows), "paired": {f"{p}_g{e}": name for (p, e), name in paired.items()}}
    notes = {"albedo": {"units": "1"}, "edges": {"units": "um"}}
    arrays = {"albedo": albedo, "mask": mask, "edges": spectra.wavelength_edges()}
    write_arrays(work.output / "spectra.bin", arrays, attributes, notes)
    return list(rows), albedo, paired


def build_text(work: Work, climates: list[ClimateRow], organisms: list[OrganismRow], pairs: list[PairRow]) -> None:
    """Pack the language corpus and train the tokenizer on its training chapters and the texts of training planets and
    organisms.
    """
    lines: list[dict[str, str]] = []
    path = work.raw / "text" / CORPUS_FILE
    with work.tolerated("no language corpus; the tokenizer sees descriptions and notes alone"):
        for k, m in enumerate(text.read_jsonl(path, ("chapter", "module", "title", "text"))):
            if not m["text"].split():
                work.blame(DataError(path, f"line {k + 1}, text", "holds no words"), "module left out")
                continue
            part = pack.corpus_part(m["module"])
            lines.append({**{key: m[key] for key in ("chapter", "module", "title", "text")}, "part": part})
    if lines:
        data = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines).encode()
        (work.output / "corpus.jsonl.xz").write_bytes(lzma.compress(data, preset=9))
        work.record("corpus.jsonl.xz", path)
    used_planets = {p.planet for p in pairs if p.cell == splits.TRAIN}
    used_organisms = {p.organism for p in pairs if p.cell == splits.TRAIN}
    training = [line["text"] for line in lines if line["part"] == splits.TRAIN]
    training += [c.text for c in climates if c.planet in used_planets]
    training += [o.text for o in organisms if o.organism in used_organisms]
    if used_planets:
        text.train_tokenizer(training, VOCAB_SIZE).save(str(work.output / "tokenizer.json"), pretty=False)
    else:  # nothing to train it on
        shutil.copyfile(SAMPLE_FOLDER / "tokenizer.json", work.output / "tokenizer.json")


def _statistics(work: Work, climates: list[ClimateRow], pairs: list[PairRow], library: Library) -> dict[str, Any]:
    """Means and deviations over the training part; of a pack that is all test, those of the bundled data: a model reads
    it by the statistics of its own training data anyway.
    """
    fitted = sorted({p.planet for p in pairs if p.cell == splits.TRAIN})
    if not fitted:
        given = pack.open_pack(SAMPLE_FOLDER).spec
        work.problems.append("no training pair: a pack to evaluate on, not to train with; bundled statistics are used")
        return {name: getattr(given, name) for name in pack.STATISTICS}
    rows = [c for c in climates if c.planet in fitted]
    mean, std = pack.cube_statistics([work.codes[f"{c.planet}_g{c.epoch}"] for c in rows])
    params, spectrum = pack.param_statistics(rows), pack.spectrum_statistics(*library, fitted)
    return dict(zip(pack.STATISTICS, (mean, std, *params, *spectrum, tuple(fitted)), strict=True))


def build_spec(work: Work, climates: list[ClimateRow], pairs: list[PairRow], library: Library) -> DataSpec:
    """Sizes, axes and training statistics."""
    grid = work.grid
    if grid is None:
        raise DataError(work.raw / "climate", "", "no usable climate file")
    statistics = _statistics(work, climates, pairs, library)
    tokenizer = json.loads((work.output / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    edges = spectra.wavelength_edges()
    return DataSpec(
        variables=cubes.VARIABLES,
        units=cubes.UNITS,
        levels=tuple(grid.levels.tolist()),
        level_bounds=tuple(pack.level_bounds(grid.levels).tolist()),
        latitudes=tuple(grid.latitudes.tolist()),
        latitude_bounds=tuple(pack.latitude_bounds(grid.latitudes).tolist()),
        longitudes=tuple(grid.longitudes.tolist()),
        months=grid.months,
        n_epochs=N_EPOCHS,
        planet_param_names=planets.PARAM_NAMES,
        planet_param_units=planets.PARAM_UNITS,
        wavelengths=tuple(np.sqrt(edges[1:] * edges[:-1]).tolist()),
        vocab_size=len(tokenizer["model"]["vocab"]),
        pad_id=ids[PAD],
        bos_id=ids[BOS],
        eos_id=ids[EOS],
        sep_id=ids[SEP],
        max_text_tokens=MAX_TEXT_TOKENS,
        class_threshold=labels.CLASS_THRESHOLD,
        laplacian_dim=LAPLACIAN_DIM,
        random_walk_dim=RANDOM_WALK_DIM,
        **statistics,
    )


def write_manifest(work: Work, summary: dict[str, Any]) -> None:
    """``manifest.json``: SHA-256 and size of every file, raw sources with theirs, what was left out."""
    files = sorted(p for p in work.output.rglob("*") if p.is_file() and p.name != pack.MANIFEST)
    entries = {
        str(p.relative_to(work.output)): {
            "sha256": digest(p),
            "bytes": p.stat().st_size,
            "sources": work.sources.get(str(p.relative_to(work.output)), []),
        }
        for p in files
    }
    manifest = {"format": pack.FORMAT, "files": entries, "left_out": work.problems, **summary}
    (work.output / pack.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def build(raw: Path, output: Path, workers: int = 2, psg_tables: bool = False) -> list[str]:
    """Build the pack in ``output`` from ``raw``; returns what was left out and why.

    A pack that is there already is replaced when the new one is complete; until then the work is done in a folder of
    its own beside it, see ``astrobiogen.system.staging``. A link at ``output`` stays: what it points to is replaced.

    Raises:
        DataError: Nothing usable in ``raw``; ``output`` is not empty and not a pack, or holds files that are not the
            pack's; or another process is building it. What was there stays as it was.
    """
    if not (raw / "climate").is_dir():
        raise DataError(raw, "climate", "folder absent; lay raw files out as docs/data.md describes")
    target = staging.target_of(output)
    _replaceable(output, target)
    try:
        with staging.owned(target), staging.workplace(target) as folder:
            _replaceable(output, target)
            new = folder / staging.NEW
            new.mkdir()
            work = Work(raw, new, workers)
            _build(work, psg_tables)
            _replaceable(output, target)
            staging.replace_folder(folder, target)
            return work.problems
    except staging.BusyError as error:
        raise DataError(output, "", f"{error.strerror}; nothing was changed") from error


def _replaceable(output: Path, target: Path) -> None:
    """Refuse to replace anything but an empty folder or a pack with nothing else in it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(output, "", "is a file, expected a folder; nothing was changed")
    held = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not held:
        return
    try:
        listed = set(pack.read_manifest(target)["files"])
    except DataError as error:
        text = f"is not empty and not a packed dataset ({error.problem}); nothing was changed"
        raise DataError(output, "", text) from error
    if foreign := sorted(held - listed - {pack.MANIFEST}):
        text = f"is not of the packed dataset there, and would be lost ({len(foreign)} such files); nothing was changed"
        raise DataError(output, foreign[0], text)


def _build(work: Work, psg_tables: bool) -> None:
    """All files of the pack in ``work.output``."""
    raw, output = work.raw, work.output
    known = placed(raw)
    climates = build_climates(work)
    if work.grid is None:
        raise DataError(raw / "climate", "", "no usable climate file: " + "; ".join(work.problems[:3]))
    organisms = build_networks(work)
    if not organisms:
        raise DataError(raw / "metabolic", "", "no usable network: " + "; ".join(work.problems[-3:]))
    library = build_spectra(work, climates, psg_tables)
    parts = pack.parts_of(climates, organisms, known)
    pairs = build_pairs(output, climates, organisms, parts, work.grid)
    build_text(work, climates, organisms, pairs)
    write_rows(output / "climates.csv", climates, ClimateRow)
    write_rows(output / "organisms.csv", organisms, OrganismRow)
    write_rows(output / "pairs.csv", pairs, PairRow)
    write_rows(output / pack.PARTS, parts, PartRow)
    (output / "spec.json").write_text(build_spec(work, climates, pairs, library).to_json() + "\n", encoding="utf-8")
    licences = raw / "LICENSES.md"
    with work.tolerated("the pack says nothing of its sources' licences"):
        if not licences.is_file():
            raise DataError(licences, "", "is missing")
        shutil.copyfile(licences, output / "LICENSES.md")
    counts = {"climates": len(climates), "organisms": len(organisms), "pairs": len(pairs)}
    write_manifest(work, {"counts": counts, "spectrum_names": library[0]})


def split_summary(output: Path) -> str:
    """How many star systems and genera each part of the split has."""
    counts = Counter((row.kind, row.part) for row in pack.read_parts(output / pack.PARTS))
    kinds = ((splits.STAR_SYSTEM, "star systems"), (splits.GENUS, "genera"))
    return "; ".join(
        f"{what} " + ", ".join(f"{counts[kind, part]} {part}" for part in splits.PARTS) for kind, what in kinds
    )


def main(arguments: list[str]) -> int:
    """Command line of ``build``."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data build",
        description="Build a packed dataset from raw files (docs/data.md describes the folder). A bad file is left out "
        "or masked and listed at the end; it never stops the build.",
    )
    parser.add_argument(
        "--raw", type=Path, required=True, help="folder with climate/, metabolic/, spectra/, tables/, text/"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help=f"folder of the pack; replaced if it is one already (default {OUTPUT})",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read networks, at least 1 (default 2)")
    parser.add_argument(
        "--psg-tables",
        action="store_true",
        help="also pack the spectra of no climate in spectra/psg/*.parquet (needs astrobiogen[psg])",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: got {options.workers}, expected at least 1")
    problems = build(options.raw, options.output, options.workers, options.psg_tables)
    counts = pack.read_manifest(options.output)["counts"]
    for problem in problems:
        sys.stdout.write(f"left out or masked: {problem}\n")
    made = ", ".join(f"{n} {what}" for what, n in counts.items())
    sys.stdout.write(f"{options.output}: {made}; {len(problems)} things left out or masked\n")
    say(f"split: {split_summary(options.output)}")
    say(f"check it with: python -m astrobiogen.data check {options.output}")
    return 0
