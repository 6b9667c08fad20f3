"""``python -m astrobiogen.data describe [DIR] --output DIR``: the plots and tables of the data card."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from astrobiogen.data import cubes, splits
from astrobiogen.data.load import SAMPLE_FOLDER, load
from astrobiogen.data.pack import Pack, open_pack

_DPI = 90
_MAPPED = (("earth", 2), ("trappist1e", 1), ("ross128b", 0))


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def plot_maps(pack: Pack, folder: Path) -> None:
    """Input (lowest-level temperature and humidity, segment 1) and label field (surface temperature, segment 2) of
    three climates.
    """
    spec = pack.spec
    shape = (spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes))
    rows = [c for c in pack.climates if (c.planet, c.epoch) in _MAPPED]
    figure = Figure(figsize=(11, 2.6 * len(rows)))
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        codes = cubes.read_codes(pack.contents(row.cube_file), shape)
        tables = {v: cubes.value_table(v, int(codes[v].max()) + 1) for v in cubes.VARIABLES}
        ta = tables["ta"][codes["ta"][:, -1]].mean(axis=0)
        hus = 1000.0 * tables["hus"][codes["hus"][:, -1]].mean(axis=0)
        ts, sic = cubes.read_surface(pack.root / row.surface_file, *shape[:1], *shape[2:])
        extent = (0.0, 360.0, -90.0, 90.0)
        titles = (
            "input: lowest-level T [K]",
            "input: lowest-level humidity [g/kg]",
            "label segment: surface T [K], ice edge",
        )
        for axis, field, title in zip(line, (ta, hus, ts.mean(axis=0)), titles, strict=True):
            picture = axis.imshow(field, extent=extent, aspect="auto", cmap="viridis")
            axis.set_title(f"{row.planet} g{row.epoch} {title}", fontsize=8)
            figure.colorbar(picture, ax=axis)
        line[2].contour(np.array(spec.longitudes), np.array(spec.latitudes), sic.mean(axis=0), levels=[0.5], colors="w")
    _save(figure, folder / "maps.png")


def plot_graphs(pack: Pack, folder: Path) -> None:
    """Degree distribution of metabolites and reactions over all networks, and the sizes of the networks."""
    graphs = [entry.graph for entry in load(pack.root).train.store.organisms.values() if entry.graph is not None]
    figure = Figure(figsize=(10, 3.2))
    left, right = figure.subplots(1, 2)
    for kind, name in ((0, "metabolites"), (1, "reactions")):
        degrees = np.concatenate(
            [np.bincount(g["edge_index"].flatten().numpy())[g["node_type"].numpy() == kind] for g in graphs]
        )
        counts = np.bincount(degrees)
        known = np.flatnonzero(counts)
        left.loglog(known[known > 0], counts[known[known > 0]] / len(graphs), ".", label=name)
    left.set_xlabel("degree")
    left.set_ylabel("nodes per network")
    left.legend()
    right.scatter([o.metabolites for o in pack.organisms], [o.reactions for o in pack.organisms], s=12)
    right.set_xlabel("metabolites")
    right.set_ylabel("reactions")
    _save(figure, folder / "networks.png")


def plot_labels(pack: Pack, folder: Path) -> None:
    """Histogram of S, and the growth ranges of the organisms."""
    figure = Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2)
    left.hist([p.fraction for p in pack.pairs], bins=40)
    left.axvline(pack.spec.class_threshold, color="k", ls="--")
    left.set_xlabel("S (dashed: class threshold)")
    left.set_ylabel("pairs")
    ordered = sorted(pack.organisms, key=lambda o: (o.niche_low, o.organism))
    colours = ["C0" if o.niche_source.startswith("Corkrey") else "C1" for o in ordered]
    right.hlines(range(len(ordered)), [o.niche_low for o in ordered], [o.niche_high for o in ordered], colors=colours)
    right.set_xlabel("growth range [deg C]; blue: measured, orange: optimum -22/+8")
    right.set_yticks([])
    _save(figure, folder / "labels.png")


def plot_spectra(pack: Pack, folder: Path) -> None:
    """The albedo spectra; thick ones are paired with a climate."""
    contents = pack.contents("spectra.bin")
    figure = Figure(figsize=(8, 3.6))
    axis = figure.subplots()
    paired = set(contents.attributes["paired"].values())
    for name, albedo in zip(contents.attributes["names"], contents.arrays["albedo"], strict=True):
        axis.plot(pack.spec.wavelengths, albedo, lw=2.0 if name in paired else 0.6, label=name)
    axis.set_xlabel("wavelength [um]")
    axis.set_ylabel("albedo")
    axis.legend(fontsize=6, ncols=2)
    _save(figure, folder / "spectra.png")


def split_table(pack: Pack) -> str:
    """Markdown table of the cells: pairs, positives, mean S, planets, star systems, species, genera."""
    systems = {(c.planet, c.epoch): c.star_system for c in pack.climates}
    organisms = {o.organism: o for o in pack.organisms}
    lines = [
        "| cell | pairs | class 1 | mean S | planets | star systems | networks | genera |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in splits.CELLS:
        pairs = [p for p in pack.pairs if p.cell == cell]
        if not pairs:
            continue
        share, mean = sum(p.label for p in pairs) / len(pairs), sum(p.fraction for p in pairs) / len(pairs)
        sets = (
            {p.planet for p in pairs},
            {systems[p.planet, p.epoch] for p in pairs},
            {p.organism for p in pairs},
            {organisms[p.organism].genus for p in pairs},
        )
        sizes = " | ".join(str(len(s)) for s in sets)
        lines.append(f"| {cell} | {len(pairs)} | {share:.1%} | {mean:.3f} | {sizes} |")
    return "\n".join(lines)


def variance_table(pack: Pack) -> str:
    """Share of the variance of S explained by the climate alone, the organism alone and their sum (two-way means of
    the full table).
    """
    climates = sorted({(p.planet, p.epoch) for p in pack.pairs})
    organisms = sorted({p.organism for p in pack.pairs})
    table = np.full((len(climates), len(organisms)), math.nan)
    for p in pack.pairs:
        table[climates.index((p.planet, p.epoch)), organisms.index(p.organism)] = p.fraction
    if np.isnan(table).any():
        return "not a full table"
    mean = table.mean()
    rows, columns = table.mean(axis=1, keepdims=True) - mean, table.mean(axis=0, keepdims=True) - mean
    total = ((table - mean) ** 2).mean()
    return (
        f"climate alone {(rows**2).mean() / total:.2f}, organism alone {(columns**2).mean() / total:.2f}, "
        f"additive {((rows**2).mean() + (columns**2).mean()) / total:.2f}, "
        f"interaction {((table - mean - rows - columns) ** 2).mean() / total:.2f}"
    )


def climate_table(pack: Pack) -> str:
    """Markdown table of the climates with their acceptance figures."""
    lines = [
        "| climate | star system | flux W/m2 | CO2 bar | O2 bar | TOA seg 1, seg 2 W/m2 | ts seg 2 K | mean S |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = pack.spec.planet_param_names
    for c in pack.climates:
        values = dict(zip(names, c.params, strict=True))
        s = [p.fraction for p in pack.pairs if (p.planet, p.epoch) == (c.planet, c.epoch)]
        air = f"{10 ** values['log10_p_co2']:.2g} | {values['p_o2']:.2g}"
        balance = f"{c.toa_imbalance_input:+.1f}, {c.toa_imbalance_label:+.1f} | {c.ts_label:.1f}"
        mean = sum(s) / len(s)
        flux = f"{values['stellar_flux']:.0f}"
        lines.append(f"| {c.planet} g{c.epoch} | {c.star_system} | {flux} | {air} | {balance} | {mean:.3f} |")
    return "\n".join(lines)


def describe(root: Path, output: Path) -> str:
    """Write four plots (``.png``) and ``tables.md`` into ``output``; returns the tables."""
    mpl.use("Agg")
    pack = open_pack(root)
    output.mkdir(parents=True, exist_ok=True)
    plot_maps(pack, output)
    plot_graphs(pack, output)
    plot_labels(pack, output)
    plot_spectra(pack, output)
    oxygen = Counter((o.grows_without_o2, o.grows_without_o2_h2) for o in pack.organisms)
    text = "\n\n".join(
        (
            "## Split cells",
            split_table(pack),
            "## Variance of S",
            variance_table(pack),
            "## Networks by growth without (O2, O2 and H2)",
            ", ".join(f"{k}: {n}" for k, n in sorted(oxygen.items())),
            "## Climates",
            climate_table(pack),
        )
    )
    (output / "tables.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(arguments: list[str]) -> int:
    """Command line of ``describe``."""
    parser = argparse.ArgumentParser(prog="python -m astrobiogen.data describe", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=SAMPLE_FOLDER, help="folder of the pack (default: the bundled one)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for plots and tables")
    options = parser.parse_args(arguments)
    sys.stdout.write(describe(options.folder, options.output) + "\n")
    return 0
