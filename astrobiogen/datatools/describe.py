"""``python -m astrobiogen.data describe [DIR] --output DIR``: the plots and tables of the data card."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from astrobiogen.data import labels, splits
from astrobiogen.data.climates import cubes
from astrobiogen.data.load import SAMPLE_FOLDER, load
from astrobiogen.data.storage.pack import BY_NAME, IN_SAMPLE, IN_TABLE, Pack, open_pack
from astrobiogen.datatools.progress import track

_DPI = 100
_MAPPED = (("earth", 2), ("trappist1e", 1), ("ross128b", 0))
_COLOURS = {
    "train": "#4477aa", "validation": "#66ccee", "seen": "#bbbbbb", "new_planet": "#ccbb44", "new_organism": "#ee6677",
    "new_both": "#aa3377",
}  # fmt: skip
_BALANCED = 2.0  # W/m2
_WORLD = (0.0, 360.0, -90.0, 90.0)  # degrees: left, right, bottom, top of a map
_NAMED_SPECTRA = 12  # more of them are drawn without names


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plot_maps(pack: Pack, folder: Path) -> None:
    """Three climates: lowest-level temperature and humidity and the zonal mean section of the input segment, and the
    surface temperature of the label segment with its ice edge.
    """
    spec = pack.spec
    shape = (spec.months, len(spec.levels), len(spec.latitudes), len(spec.longitudes))
    rows = [c for c in pack.climates if (c.planet, c.epoch) in _MAPPED] or list(pack.climates[:3])
    figure = _figure(15, 2.6 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        codes = cubes.read_codes(pack.contents(row.cube_file), shape)
        ta, hus = (cubes.value_table(v, int(codes[v].max()) + 1)[codes[v]].mean(axis=0) for v in cubes.VARIABLES)
        ts, sic = cubes.read_surface(pack.root / row.surface_file, *shape[:1], *shape[2:])
        label = ts.mean(axis=0)
        low, high = min(ta[-1].min(), label.min()), max(ta[-1].max(), label.max())
        fields = ((ta[-1], "magma", low, high), (1000.0 * hus[-1], "YlGnBu", 0.0, None), (label, "magma", low, high))
        for axis, (field, colours, least, most) in zip((line[0], line[1], line[3]), fields, strict=True):
            picture = axis.imshow(field, extent=_WORLD, aspect="auto", cmap=colours, vmin=least, vmax=most)
            axis.set(xticks=(0, 90, 180, 270, 360), yticks=(-90, -45, 0, 45, 90))
            figure.colorbar(picture, ax=axis)
        section = line[2].contourf(spec.latitudes, spec.levels, ta.mean(axis=2), levels=16, cmap="magma")
        line[2].set(xticks=(-90, -45, 0, 45, 90), xlim=(-90, 90), ylabel="p / surface pressure")
        line[2].invert_yaxis()
        figure.colorbar(section, ax=line[2])
        ice = sic.mean(axis=0)
        if ice.min() < labels.ICE_LIMIT < ice.max():
            line[3].contour(spec.longitudes, spec.latitudes, ice, levels=[labels.ICE_LIMIT], colors="w")
        line[0].set_ylabel(f"{row.catalogue_name}, epoch {row.epoch}\nlatitude")
    titles = ("input: temperature, lowest level [K]", "input: humidity, lowest level [g/kg]",
              "input: zonal mean temperature [K]", "label: surface temperature [K], ice edge white")  # fmt: skip
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis, name in zip(axes[-1], ("longitude", "longitude", "latitude", "longitude"), strict=True):
        axis.set_xlabel(name)
    _save(figure, folder / "maps.png")


def plot_graphs(pack: Pack, folder: Path) -> None:
    """Degree distributions of metabolites and reactions over all networks, and the networks' sizes by domain."""
    graphs = [entry.graph for entry in load(pack.root).train.store.organisms.values() if entry.graph is not None]
    figure = _figure(11, 3.8)
    left, right = figure.subplots(1, 2)
    for kind, name in ((0, "metabolites"), (1, "reactions")):
        degrees = np.concatenate(
            [np.bincount(g["edge_index"].flatten().numpy())[g["node_type"].numpy() == kind] for g in graphs]
        )
        # by powers of sqrt(2): single degrees above ten hold less than one node per network
        edges = np.unique(np.ceil(np.sqrt(2.0) ** np.arange(2 * math.log2(degrees.max() + 1) + 2)))
        counts, _ = np.histogram(degrees, edges)
        density, middles = counts / np.diff(edges) / len(graphs), np.sqrt(edges[:-1] * (edges[1:] - 1))
        left.loglog(middles[counts > 0], density[counts > 0], "o-", ms=4, lw=1, label=name)
    left.set(xlabel="degree", ylabel="nodes per network and degree", title="degrees (the highest: water, protons, ATP)")
    left.legend(frameon=False)
    domains = sorted({o.domain for o in pack.organisms}, key="BEA".find)  # the many first, so that they hide no others
    for domain, mark in zip(domains, itertools.cycle("osD")):
        sizes = [(o.metabolites, o.reactions) for o in pack.organisms if o.domain == domain]
        name = {"A": "archaea", "B": "bacteria", "E": "eukaryotes"}.get(domain, domain)
        right.scatter(*zip(*sizes, strict=True), s=18, marker=mark, label=f"{name} ({len(sizes)})")
    right.set(xlabel="metabolites", ylabel="reactions", title=f"{len(graphs)} networks")
    right.legend(frameon=False)
    _save(figure, folder / "networks.png")


def plot_labels(pack: Pack, folder: Path) -> None:
    """S of every pair, its histogram by cell, and the growth ranges of the organisms."""
    figure = _figure(15, 4.4)
    left, middle, right = figure.subplots(1, 3)
    warmth = {(c.planet, c.epoch): c.ts_label for c in pack.climates}
    places = sorted(warmth, key=lambda place: warmth[place])
    ordered = sorted(pack.organisms, key=lambda o: (o.niche_low + o.niche_high, o.organism))
    column = {o.organism: k for k, o in enumerate(ordered)}
    table = np.full((len(places), len(ordered)), math.nan)
    for p in pack.pairs:
        table[places.index((p.planet, p.epoch)), column[p.organism]] = p.fraction
    picture = left.imshow(table, aspect="auto", origin="lower", cmap="viridis", vmin=0.0)
    left.set(xlabel="organisms, cold- to heat-loving", ylabel="climates, cold to warm", title="S of every pair")
    figure.colorbar(picture, ax=left)
    present = [cell for cell in splits.CELLS if any(p.cell == cell for p in pack.pairs)]
    values = [[p.fraction for p in pack.pairs if p.cell == cell and p.fraction > 0] for cell in present]
    none = sum(p.fraction == 0 for p in pack.pairs)
    middle.hist(values, bins=30, stacked=True, color=[_COLOURS[c] for c in present], label=present)
    middle.axvline(pack.spec.class_threshold, color="k", ls="--", lw=1, label="class 1 from here")
    middle.set(xlabel="S", ylabel="pairs", title=f"S by cell; {none} pairs of S = 0 are not shown")
    middle.legend(frameon=False, fontsize=8)
    colours = ["C0" if o.niche_source.startswith("Corkrey") else "C1" for o in ordered]
    right.hlines(range(len(ordered)), [o.niche_low for o in ordered], [o.niche_high for o in ordered], colors=colours)
    right.plot([], [], "C0", label="measured")
    right.plot([], [], "C1", label="optimum -22/+8")
    right.set(xlabel="growth range [degrees C]", ylabel="organisms", title="where they grow", yticks=[])
    right.legend(frameon=False, loc="lower right")
    _save(figure, folder / "labels.png")


def plot_splits(pack: Pack, folder: Path) -> None:
    """Cell of every (climate, organism), grouped by star system and genus."""
    places = sorted(pack.climates, key=lambda c: (c.star_system, c.planet, c.epoch))
    organisms = sorted(pack.organisms, key=lambda o: (o.genus, o.organism))
    row = {(c.planet, c.epoch): k for k, c in enumerate(places)}
    column = {o.organism: k for k, o in enumerate(organisms)}
    table = np.full((len(places), len(organisms)), math.nan)
    for p in pack.pairs:
        table[row[p.planet, p.epoch], column[p.organism]] = splits.CELLS.index(p.cell)
    figure = _figure(12, 6)
    axis = figure.subplots()
    colours = ListedColormap([_COLOURS[c] for c in splits.CELLS])
    axis.imshow(table, aspect="auto", cmap=colours, vmin=-0.5, vmax=len(splits.CELLS) - 0.5, interpolation="nearest")
    for names, ticks, labels_of in (
        ([c.star_system for c in places], axis.set_yticks, axis.set_yticklabels),
        ([o.genus for o in organisms], axis.set_xticks, axis.set_xticklabels),
    ):
        groups = sorted(set(names))
        ticks([float(np.mean([k for k, n in enumerate(names) if n == g])) for g in groups])
        labels_of(groups, fontsize=7)
    axis.tick_params(axis="x", rotation=90)
    marks = [Patch(color=_COLOURS[c], label=f"{c} ({sum(p.cell == c for p in pack.pairs)})") for c in splits.CELLS]
    axis.legend(handles=marks, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(marks), frameon=False)
    _save(figure, folder / "splits.png")


def plot_climates(pack: Pack, folder: Path) -> None:
    """Acceptance of the climates: energy balance of the label segment against the drift of surface temperature."""
    figure = _figure(7.5, 4.6)
    axis = figure.subplots()
    axis.axvspan(-_BALANCED, _BALANCED, color="0.9", label=f"|TOA| below {_BALANCED:g} W/m$^2$")
    axis.axhline(0.0, color="0.6", lw=0.8)
    flux = [c.params[0] for c in pack.climates]
    balance, drift = [c.toa_imbalance_label for c in pack.climates], [c.ts_drift for c in pack.climates]
    picture = axis.scatter(balance, drift, c=flux, cmap="plasma", s=28, edgecolor="k", lw=0.3)
    figure.colorbar(picture, ax=axis, label="stellar flux [W/m$^2$]")
    axis.set(xlabel="net radiation at the top, label segment [W/m$^2$]", ylabel="T$_s$, label minus input segment [K]",
             title="how far the climates are from equilibrium")  # fmt: skip
    axis.legend(frameon=False)
    _save(figure, folder / "climates.png")


def plot_spectra(pack: Pack, folder: Path) -> None:
    """The albedo spectra, those that are paired with a climate and the rest of the library."""
    contents = pack.contents("spectra.bin")
    figure = _figure(11, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    paired = set(contents.attributes["paired"].values())
    named = len(contents.attributes["names"]) - len(paired) <= _NAMED_SPECTRA
    arrays = (contents.attributes["names"], contents.arrays["albedo"], contents.arrays["mask"])
    for name, albedo, mask in zip(*arrays, strict=True):
        values, axis = np.where(mask, albedo, math.nan), left if name in paired else right
        style = {"label": name.replace("_", " ")} if named or axis is left else {"color": "0.5", "alpha": 0.3}
        axis.plot(pack.spec.wavelengths, values, lw=1.6 if axis is left else 0.9, **style)
    for axis, title in ((left, "of a climate"), (right, "of no climate")):
        axis.set(xlabel="wavelength [um]", title=title)
        if axis.get_legend_handles_labels()[0]:
            place = {"loc": "upper right"} if axis is left else {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axis.legend(fontsize=8, frameon=False, **place)
    left.set_ylabel("albedo")
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


def part_table(pack: Pack) -> str:
    """Markdown table of the star systems and genera of each part, with who placed them."""
    lines = ["| part | star systems | genera |", "|---|---|---|"]
    for part in splits.PARTS:
        names = [
            ", ".join(sorted(row.name for row in pack.parts if (row.kind, row.part) == (kind, part)))
            for kind in splits.KINDS
        ]
        lines.append(f"| {part} | {' | '.join(names)} |")
    sources = Counter(row.source for row in pack.parts)
    told = {IN_SAMPLE: "as in the bundled sample", IN_TABLE: "by tables/split.csv", BY_NAME: "by their names"}
    return "\n".join(lines) + "\n\n" + ", ".join(f"{sources[s]} {words}" for s, words in told.items() if sources[s])


def growth_table(pack: Pack) -> str:
    """How many networks grow without which gas."""
    count = Counter((o.grows_without_o2, o.grows_without_o2_h2) for o in pack.organisms)
    return (
        f"without O2 and without H2 too: {count[1, 1]}; without O2, but not without both: {count[1, 0]}; "
        f"with O2 only: {count[0, 0]}"
    )


def climate_table(pack: Pack) -> str:
    """Markdown table of the climates with their acceptance figures."""
    lines = [
        "| climate | star system | flux W/m2 | CO2 bar | O2 bar | TOA seg 1, 2 W/m2 | ts seg 2 K | drift K | mean S |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = pack.spec.planet_param_names
    for c in pack.climates:
        values = dict(zip(names, c.params, strict=True))
        s = [p.fraction for p in pack.pairs if (p.planet, p.epoch) == (c.planet, c.epoch)]
        air = f"{10 ** values['log10_p_co2']:.2g} | {values['p_o2']:.2g}"
        balance = f"{c.toa_imbalance_input:+.1f}, {c.toa_imbalance_label:+.1f} | {c.ts_label:.1f} | {c.ts_drift:+.1f}"
        mean = sum(s) / len(s) if s else math.nan
        flux = f"{values['stellar_flux']:.0f}"
        lines.append(f"| {c.planet} g{c.epoch} | {c.star_system} | {flux} | {air} | {balance} | {mean:.3f} |")
    return "\n".join(lines)


def describe(root: Path, output: Path) -> str:
    """Write six plots (``.png``) and ``tables.md`` into ``output``; returns the tables."""
    mpl.use("Agg")
    pack = open_pack(root)
    output.mkdir(parents=True, exist_ok=True)
    plots = (plot_maps, plot_graphs, plot_labels, plot_splits, plot_climates, plot_spectra)
    for plot in track(plots, "plots", len(plots), lambda p: p.__name__):
        plot(pack, output)
    text = "\n\n".join(
        (
            "## Split cells",
            split_table(pack),
            "## Parts",
            part_table(pack),
            "## Variance of S",
            variance_table(pack),
            "## Networks by growth",
            growth_table(pack),
            "## Climates",
            climate_table(pack),
        )
    )
    (output / "tables.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(arguments: list[str]) -> int:
    """Command line of ``describe``."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data describe",
        description="Write the plots (PNG) and tables (tables.md) of a packed dataset, and print the tables.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=SAMPLE_FOLDER, help="folder of the pack (default: the bundled one)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for plots and tables")
    parser.add_argument(
        "--climate-work",
        type=Path,
        metavar="DIR",
        help="work folder of make-climate (RAW/climate-work): also plot how its runs came to balance, make_climate.png",
    )
    options = parser.parse_args(arguments)
    sys.stdout.write(describe(options.folder, options.output) + "\n")
    if options.climate_work is not None:
        runs = importlib.import_module("astrobiogen.datatools.make_climate.plot")  # needs astrobiogen[data]
        runs.describe_runs(options.climate_work, options.output / "make_climate.png")
    return 0
