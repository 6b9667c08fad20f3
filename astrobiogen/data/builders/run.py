"""``python -m astrobiogen.data build --raw DIR --output DIR``: raw files to a packed dataset.

Order of the work: climates, networks, texts and spectra, splits, statistics and tokenizer (training part only), pairs,
manifest. A file that cannot be used is left out and listed at the end; equal input gives equal bytes on one machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import hashlib
import json
import lzma
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astrobiogen.data import cubes, labels, pack, splits
from astrobiogen.data.builders import climate, fba, planets, spectra, text
from astrobiogen.data.builders.network import PackedNetwork, pack_network
from astrobiogen.data.container import write_arrays
from astrobiogen.data.errors import DataError
from astrobiogen.data.graphs import LAPLACIAN_DIM, RANDOM_WALK_DIM
from astrobiogen.data.spec import DataSpec
from astrobiogen.data.tables import ClimateRow, OrganismRow, PairRow, write_rows
from astrobiogen.data.text import BOS, EOS, MAX_TEXT_TOKENS, PAD, SEP, VOCAB_SIZE

_CLIMATE_FILE = re.compile(r"(?P<planet>[a-z0-9]+)_g(?P<epoch>\d)_(?P<setting>.+)_seg1\.nc")
N_EPOCHS = 3
CORPUS_FILE = "openstax_astronomy2e_ccby_63157f3.jsonl.gz"


@dataclass
class Work:
    """State of one build: where from, where to, what was made and what had to be left out."""

    raw: Path
    output: Path
    workers: int
    problems: list[str] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[str, dict[str, NDArray[np.int16]]] = field(default_factory=dict)
    grid: climate.Grid | None = None

    def say(self, message: str) -> None:
        """Progress to standard error."""
        sys.stderr.write(message + "\n")
        sys.stderr.flush()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _one_climate(
    work: Work, path: Path, run_id: int, catalogue: dict[str, dict[str, str]], notes: dict[str, str]
) -> ClimateRow:
    found = _CLIMATE_FILE.fullmatch(path.name)
    if found is None or found["planet"] not in planets.CATALOGUE:
        raise DataError(path, "", "name is not <planet>_g<epoch>_<setting>_seg1.nc of a known planet")
    later = path.with_name(path.name.replace("_seg1", "_seg2"))
    first, second = climate.read_climate(path, ("ta", "hus")), climate.read_climate(later, ("ts", "sic"))
    grid = first.grid
    if work.grid is None:
        work.grid = grid
    elif not (
        np.allclose(grid.latitudes, work.grid.latitudes) and np.allclose(grid.levels, work.grid.levels, atol=1e-4)
    ):
        raise DataError(path, "lat/lev", "grid differs from that of the first climate")
    key = f"{found['planet']}_g{found['epoch']}"
    codes = {"ta": cubes.quantise_ta(first.fields["ta"]), "hus": cubes.quantise_hus(first.fields["hus"])}
    work.codes[key] = codes
    notes_of = {
        "ta": {"units": "K", "step": cubes.TA_STEP, "meaning": "code * step"},
        "hus": {"units": "kg kg-1", "step": cubes.HUS_STEP, "meaning": "0, or 1e-7 * exp((code - 1) * step)"},
    }
    common = {"planet": found["planet"], "epoch": int(found["epoch"])}
    write_arrays(work.output / f"climate/{key}.bin", codes, {**common, "segment": 1}, notes_of, delta2=("ta", "hus"))
    ts = np.round(second.fields["ts"] / cubes.TS_STEP).astype(np.int16)
    sic = np.floor(np.clip(second.fields["sic"], 0.0, 1.0) / cubes.SIC_STEP + 1e-9).astype(np.int16)
    surface_notes = {
        "ts": {"units": "K", "step": cubes.TS_STEP},
        "sic": {"units": "1", "step": cubes.SIC_STEP, "rounding": "down"},
    }
    write_arrays(
        work.output / f"surface/{key}.bin",
        {"ts": ts, "sic": sic},
        {**common, "segment": 2},
        surface_notes,
        delta2=("ts", "sic"),
    )
    for folder, file in (("climate", path), ("surface", later)):
        work.sources[f"{folder}/{key}.bin"] = [f"climate/{file.name}", _sha256(file)]
    name, system = planets.CATALOGUE[found["planet"]]
    values = planets.parameters(found["planet"], first.parameters, catalogue)
    weights = labels.latitude_weights(pack.latitude_bounds(grid.latitudes))
    described = planets.description(values)
    note = text.planet_note(notes.get(name, ""), (name, system, *name.split(), "Proxima", "Kepler", "TRAPPIST"))
    return ClimateRow(
        run_id,
        found["planet"],
        name,
        system,
        int(found["epoch"]),
        found["setting"],
        f"climate/{key}.bin",
        f"surface/{key}.bin",
        first.toa_imbalance,
        second.toa_imbalance,
        float(codes["ta"][:, -1].mean() * cubes.TA_STEP),
        float((ts * cubes.TS_STEP).mean(axis=(0, 2)) @ weights),
        tuple(values.values()),
        f"{described} {note}".strip(),
    )


def build_climates(work: Work) -> list[ClimateRow]:
    """Pack every climate that has both segments."""
    catalogue = planets.read_catalogue(work.raw / "tables/oec_planets.csv.gz")
    rows = text.read_jsonl(work.raw / "text/oec_descriptions.jsonl.gz", ("planet", "text"))
    notes = {row["planet"]: row["text"] for row in rows}
    done: list[ClimateRow] = []
    files = sorted((work.raw / "climate").glob("*_seg1.nc"))
    for k, path in enumerate(files):
        try:
            done.append(_one_climate(work, path, len(done), catalogue, notes))
        except DataError as error:
            work.problems.append(str(error))
        work.say(f"climate {k + 1}/{len(files)} {path.name}")
    return done


def _organism_row(work: Work, row: dict[str, str], made: PackedNetwork | DataError, note: str) -> OrganismRow | None:
    """Pack one network; None (and a line in the problems) when the file is bad, the niche unknown or the model does
    not grow.
    """
    organism = row["file_gz"].removesuffix(".xml.gz")
    if isinstance(made, DataError):
        work.problems.append(str(made))
        return None
    low_high = labels.growth_range(
        _float(row["ogt_c"]), int(row["corkrey_obs"] or 0), _float(row["corkrey_tmin"]), _float(row["corkrey_tmax"])
    )
    if low_high is None:
        work.problems.append(f"{row['file_gz']}: {row['species']} has no known growth range, dropped")
        return None
    if made.growth <= fba.GROWTH_THRESHOLD:
        work.problems.append(
            f"{row['file_gz']}: the model of {row['species']} does not grow in its published medium, dropped"
        )
        return None
    write_arrays(work.output / f"metabolic/{organism}.bin", made.arrays, {"organism": organism})
    work.sources[f"metabolic/{organism}.bin"] = [
        f"metabolic/sbml/{row['file_gz']}",
        _sha256(work.raw / "metabolic/sbml" / row["file_gz"]),
    ]
    measured = int(row["corkrey_obs"] or 0) >= labels.MIN_GROWTH_OBSERVATIONS and _float(row["corkrey_tmax"]) > _float(
        row["corkrey_tmin"]
    )
    flags = [int(mu > fba.GROWTH_THRESHOLD) for mu in (made.growth, made.growth_without_o2, made.growth_without_o2_h2)]
    return OrganismRow(
        organism=organism,
        species=row["species"],
        genus=row["species"].split()[0],
        domain=row["domain"],
        niche_low=low_high[0],
        niche_high=low_high[1],
        niche_source="Corkrey 2016" if measured else "Engqvist 2018 -22/+8",
        grows=flags[0],
        grows_without_o2=flags[1],
        grows_without_o2_h2=flags[2],
        metabolites=made.metabolites,
        reactions=made.reactions,
        edges=made.edges,
        graph_file=f"metabolic/{organism}.bin",
        text=note,
    )


def _float(value: str) -> float:
    return float(value) if value else math.nan


def _packed(paths: list[Path], workers: int) -> Iterator[PackedNetwork | DataError]:
    """Networks in the order of ``paths``; in this process when ``workers`` is 0, else in fresh worker processes."""
    if workers == 0:
        yield from map(pack_network, paths)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(pack_network, paths)


def build_networks(work: Work) -> list[OrganismRow]:
    """Pack every network whose organism has a growth range and whose model grows; SBML is read in worker processes."""
    with (work.raw / "metabolic/organisms.csv").open(encoding="utf-8", newline="") as handle:
        table = sorted(csv.DictReader(handle), key=lambda row: row["file_gz"])
    rows = text.read_jsonl(work.raw / "text/organism_notes.jsonl.gz", ("biomodels_id", "species", "name", "text"))
    notes = {row["biomodels_id"]: row for row in rows}
    everyone = sorted({row["species"] for row in table})
    done: list[OrganismRow] = []
    paths = [work.raw / "metabolic/sbml" / row["file_gz"] for row in table]
    for k, (row, made) in enumerate(zip(table, _packed(paths, work.workers), strict=True)):
        note = notes.get(row["biomodels_id"])
        clean = text.organism_note(note["text"], note["name"], row["species"], everyone) if note else ""
        if (packed := _organism_row(work, row, made, clean)) is not None:
            done.append(packed)
        work.say(f"network {k + 1}/{len(table)} {row['file_gz']}")
    return done


def build_pairs(
    output: Path, climates: list[ClimateRow], organisms: list[OrganismRow], grid: climate.Grid
) -> list[PairRow]:
    """Label and split every (climate, organism)."""
    held = pack.held_out(climates, organisms)
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


def build_spectra(work: Work) -> tuple[list[str], NDArray[np.float32]]:
    """Pack the albedo library; returns names and albedo [n, 256]."""
    names: list[str] = []
    albedo: list[NDArray[np.float32]] = []
    masks: list[NDArray[np.bool_]] = []
    for name, (file, _, _) in spectra.LIBRARY.items():
        try:
            values, mask = spectra.read_spectrum(work.raw / "spectra/vpl", name)
        except DataError as error:
            work.problems.append(str(error))
            continue
        names.append(name)
        albedo.append(values)
        masks.append(mask)
        work.sources.setdefault("spectra.bin", []).extend(
            [f"spectra/vpl/{file}", _sha256(work.raw / "spectra/vpl" / file)]
        )
    attributes = {"names": names, "paired": {f"{p}_g{e}": name for (p, e), name in spectra.PAIRED.items()}}
    notes = {"albedo": {"units": "1"}, "edges": {"units": "um"}}
    arrays = {"albedo": np.array(albedo), "mask": np.array(masks), "edges": spectra.wavelength_edges()}
    write_arrays(work.output / "spectra.bin", arrays, attributes, notes)
    return names, np.array(albedo)


def build_text(work: Work, climates: list[ClimateRow], organisms: list[OrganismRow], pairs: list[PairRow]) -> None:
    """Pack the language corpus and train the tokenizer on its training chapters and the texts of training planets and
    organisms.
    """
    modules = text.read_jsonl(work.raw / "text" / CORPUS_FILE, ("chapter", "module", "title", "text"))
    lines = [
        {**{k: m[k] for k in ("chapter", "module", "title", "text")}, "part": pack.corpus_part(m["module"])}
        for m in modules
    ]
    data = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines).encode()
    (work.output / "corpus.jsonl.xz").write_bytes(lzma.compress(data, preset=9))
    work.sources["corpus.jsonl.xz"] = [f"text/{CORPUS_FILE}", _sha256(work.raw / "text" / CORPUS_FILE)]
    used_planets = {p.planet for p in pairs if p.cell == splits.TRAIN}
    used_organisms = {p.organism for p in pairs if p.cell == splits.TRAIN}
    training = [line["text"] for line in lines if line["part"] == splits.TRAIN]
    training += [c.text for c in climates if c.planet in used_planets]
    training += [o.text for o in organisms if o.organism in used_organisms]
    text.train_tokenizer(training, VOCAB_SIZE).save(str(work.output / "tokenizer.json"), pretty=False)


def build_spec(
    work: Work, climates: list[ClimateRow], pairs: list[PairRow], library: tuple[list[str], NDArray[np.float32]]
) -> DataSpec:
    """Sizes, axes and training statistics."""
    grid = work.grid
    if grid is None:
        raise DataError(work.raw / "climate", "", "no usable climate file")
    fitted = sorted({p.planet for p in pairs if p.cell == splits.TRAIN})
    rows = [c for c in climates if c.planet in fitted]
    mean, std = pack.cube_statistics([work.codes[f"{c.planet}_g{c.epoch}"] for c in rows])
    param_mean, param_std = pack.param_statistics(rows)
    spectrum_mean, spectrum_std = pack.spectrum_statistics(*library, spectra.PAIRED, fitted)
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
        cube_mean=mean,
        cube_std=std,
        param_mean=param_mean,
        param_std=param_std,
        spectrum_mean=spectrum_mean,
        spectrum_std=spectrum_std,
        class_threshold=labels.CLASS_THRESHOLD,
        fitted_on=tuple(fitted),
        laplacian_dim=LAPLACIAN_DIM,
        random_walk_dim=RANDOM_WALK_DIM,
    )


def write_manifest(work: Work, summary: dict[str, Any]) -> None:
    """``manifest.json``: SHA-256 and size of every file, raw sources with theirs, what was left out."""
    files = sorted(p for p in work.output.rglob("*") if p.is_file() and p.name != pack.MANIFEST)
    entries = {
        str(p.relative_to(work.output)): {
            "sha256": _sha256(p),
            "bytes": p.stat().st_size,
            "sources": work.sources.get(str(p.relative_to(work.output)), []),
        }
        for p in files
    }
    manifest = {"format": pack.FORMAT, "files": entries, "left_out": work.problems, **summary}
    (work.output / pack.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def build(raw: Path, output: Path, workers: int = 2) -> list[str]:
    """Build the pack in ``output`` (emptied first if it is a pack) from ``raw``; returns what was left out and why."""
    if not (raw / "climate").is_dir():
        raise DataError(raw, "climate", "folder absent; lay raw files out as docs/data.md describes")
    if output.exists() and any(output.iterdir()):
        if not (output / pack.MANIFEST).is_file():
            raise DataError(output, "", "is not empty and not a packed dataset; nothing was changed")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    work = Work(raw, output, workers)
    climates = build_climates(work)
    if work.grid is None:
        raise DataError(raw / "climate", "", "no usable climate file: " + "; ".join(work.problems[:3]))
    organisms = build_networks(work)
    library = build_spectra(work)
    pairs = build_pairs(output, climates, organisms, work.grid)
    build_text(work, climates, organisms, pairs)
    write_rows(output / "climates.csv", climates, ClimateRow)
    write_rows(output / "organisms.csv", organisms, OrganismRow)
    write_rows(output / "pairs.csv", pairs, PairRow)
    (output / "spec.json").write_text(build_spec(work, climates, pairs, library).to_json() + "\n", encoding="utf-8")
    shutil.copyfile(raw / "LICENSES.md", output / "LICENSES.md")
    counts = {"climates": len(climates), "organisms": len(organisms), "pairs": len(pairs)}
    write_manifest(work, {"counts": counts, "spectrum_names": library[0]})
    work.say(f"{counts}; {len(work.problems)} left out")
    return work.problems


def main(arguments: list[str]) -> int:
    """Command line of ``build``."""
    parser = argparse.ArgumentParser(prog="python -m astrobiogen.data build", description=__doc__)
    parser.add_argument(
        "--raw", type=Path, required=True, help="folder with climate/, metabolic/, spectra/, tables/, text/"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the pack")
    parser.add_argument("--workers", type=int, default=2, help="processes that read SBML; 0: none")
    options = parser.parse_args(arguments)
    for problem in build(options.raw, options.output, options.workers):
        sys.stdout.write(f"left out: {problem}\n")
    return 0
