"""A whole build from a small raw folder in which every kind of file is also present in a broken form."""

import csv
import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from astrobiogen import data
from astrobiogen.data.__main__ import main
from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.storage.pack import Pack, open_pack
from astrobiogen.datatools.builders.recompute import recomputed
from astrobiogen.datatools.builders.run import build
from astrobiogen.datatools.check import check
from tests.data.raw_files import GRID, climate, network

RECORDED = Path(__file__).parent / "recorded"
SYSTEMS = 7  # by their names two for the test, one for validation, four for training
GENERA = ("Aa", "Bb", "Cc", "Dd", "Ee", "Ff", "Gg")
PAGE = "<html><title>503 Service Unavailable</title></html>\n"


def write_climates(folder: Path) -> None:
    folder.mkdir(parents=True)
    for system in range(SYSTEMS):
        for segment in (1, 2):
            dataset = climate(4.0 * system - 12.0, segment)
            name = f"p{system}_g0_test_seg{segment}"
            if system == 1:  # one planet as Zarr
                dataset.to_zarr(folder / f"{name}.zarr", consolidated=False)
            else:
                dataset.to_netcdf(folder / f"{name}.nc", engine="netcdf4")
    good = (folder / "p0_g0_test_seg1.nc").read_bytes()
    later = (folder / "p0_g0_test_seg2.nc").read_bytes()
    bad = climate(0.0, 1)
    hole = bad["ta"].copy()
    hole[3, 4, 5, 6] = np.nan
    zero = bad["ta"].where(bad["lev"] != GRID.levels[2], 0.0).assign_attrs(units="K")
    broken = {
        "p1_g1": bad.drop_vars("hus"),
        "p1_g2": bad.assign(ta=bad["ta"].assign_attrs(units="furlong")),
        "p2_g1": bad.assign(ta=hole),
        "p2_g2": bad.assign(ta=zero),
        "unknown_g0": bad,
        "p4_g1": bad.assign_attrs(parameters='{"flux": 900.0}'),
        "p5_g1": bad.assign_attrs(parameters=bad.attrs["parameters"].replace('"pO2": 0.0', '"pO2": "little"')),
        "p5_g2": bad.isel(lat=slice(0, 16)),
    }
    for key, dataset in broken.items():
        dataset.to_netcdf(folder / f"{key}_test_seg1.nc", engine="netcdf4")
        (folder / f"{key}_test_seg2.nc").write_bytes(later)
    (folder / "p3_g1_test_seg1.nc").write_bytes(good[: len(good) // 2])
    (folder / "p3_g1_test_seg2.nc").write_bytes(later)
    (folder / "p3_g2_test_seg1.nc").write_bytes(good)  # has no second segment
    (folder / "p4_g2_test_seg1.nc").write_bytes(PAGE.encode())


def write_networks(folder: Path) -> None:
    (folder / "sbml").mkdir(parents=True)
    files = {f"{genus}.json": network(12 + k, k % 2 == 0) for k, genus in enumerate(GENERA)}
    files["Large.json"] = network(2499, False)  # 2,500 metabolites, 2,501 reactions
    files["Cut.json.gz"] = gzip.compress(network(12, False))[:80]
    files["Unknown.json"] = network(12, False, metabolites=[{"id": "glc_e", "compartment": "e"}])
    files["Idle.json"] = network(12, False).replace(b'"objective_coefficient": 1.0', b'"objective_coefficient": 0')
    files["Empty.json"] = b'{"metabolites": [], "reactions": []}'
    files["Page.xml"] = PAGE.encode()
    files["Nowhere.json"] = network(12, False)
    for name, raw in files.items():
        (folder / "sbml" / name).write_bytes(raw)
    files["Missing.xml.gz"] = b""
    with (folder / "organisms.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_gz", "species", "domain", "ogt_c", "corkrey_obs", "corkrey_tmin", "corkrey_tmax"])
        for k, name in enumerate(files):
            ogt = "" if name.startswith("Nowhere") else "warm" if name.startswith("Unknown") else str(8.0 + 4.0 * k)
            writer.writerow([name, f"{name.split('.')[0]} species", "B", ogt, "", "", ""])
        writer.writerow(["Nameless.json", " ", "B", "30", "", "", ""])
        writer.writerow(["", "Fileless species", "B", "30", "", "", ""])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_climates(folder / "climate")
    write_networks(folder / "metabolic")
    for name in ("tables", "text", "spectra/psg", "spectra/vpl"):
        (folder / name).mkdir(parents=True)
    rows = [("prefix", "name", "star_system"), *((f"p{k}", f"Planet {k}", f"Star {k}") for k in range(SYSTEMS))]
    (folder / "tables/planets.csv").write_text("\n".join(",".join(r) for r in rows) + "\n")
    (folder / "tables/split.csv").write_text("kind,name,part\ngenus,Ff,validation\nstar_system,Elsewhere,test\n")
    (folder / "tables/oec_planets.csv.gz").write_bytes(gzip.compress(PAGE.encode()))
    texts = [{"planet": "Planet 0", "text": " \n "}, {"planet": "Planet 1", "text": "A world of rock."}]
    notes = [{"biomodels_id": "Aa", "species": "Aa species", "name": "x", "text": "Makes sugar from air."}]
    corpus = [{"chapter": "1", "module": "m1", "title": "Stars", "text": "Stars shine. " * 40},
              {"chapter": "1", "module": "m2", "title": "Nothing", "text": "\t"}]  # fmt: skip
    for name, lines in (
        ("oec_descriptions", texts), ("organism_notes", notes), ("openstax_astronomy2e_ccby_63157f3", corpus)
    ):  # fmt: skip
        raw_lines = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / f"text/{name}.jsonl.gz").write_bytes(gzip.compress(raw_lines))
    spectrum = "# Spectral unit: Wavelength [um]\n# Radiance unit: I/F apparent albedo [rif]\n# Wave/freq Total Noise\n"
    spectrum += "".join(f"{w:.4f} {0.2 + 0.1 * np.sin(5 * w):.5f} 0.01\n" for w in np.linspace(0.3, 2.4, 4000))
    (folder / "spectra/psg/p0_g0.txt").write_text(spectrum)
    (folder / "spectra/psg/p1_g0.txt").write_text(PAGE)
    for name in ("geexhp_dados2.parquet", "geexhp_datagen3.parquet"):
        shutil.copy(RECORDED / name, folder / "spectra/psg" / name)
    (folder / "spectra/psg/page.parquet").write_text(PAGE)
    whole = gzip.compress(b"0.3 0.2\n" * 400)
    (folder / "spectra/vpl/Mars_geo_albedo.txt.gz").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def built(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("pack")
    return output, build(raw, output, workers=2, psg_tables=True)


# file, field and rule of everything that was planted
EXPECTED = (
    (r"p1_g1_test_seg1.nc [hus]: variable absent", "climate left out"),
    (r"p1_g2_test_seg1.nc [ta]: units 'furlong'", "climate left out"),
    (r"p2_g1_test_seg1.nc [ta]: 1 values are NaN", "climate left out"),
    (r"p2_g2_test_seg1.nc [ta]: values 0 to", "climate left out"),
    (r"p3_g1_test_seg1.nc: cannot be read", "climate left out"),
    (r"p3_g2_test_seg2.nc: is missing", "climate left out"),
    (r"p4_g1_test_seg1.nc [parameters.startemp]: is None", "climate left out"),
    (r"p4_g2_test_seg1.nc: cannot be read", "climate left out"),
    (r"p5_g1_test_seg1.nc [parameters.pO2]: is 'little', expected 0 to 200 bar", "climate left out"),
    (r"p5_g2_test_seg1.nc [lat]: 16 values from", "climate left out"),
    (r"organisms.csv [Nameless.json]: says nothing in species", "organism left out"),
    (r"organisms.csv [row 1 by file name]: says nothing in file_gz", "organism left out"),
    (r"unknown_g0_test_seg1.nc: planet 'unknown' is unknown", "climate left out"),
    (r"oec_planets.csv.gz [header]: is not the planet catalogue", "masked"),
    (r"oec_descriptions.jsonl.gz [line 1, text]: holds no words", "text masked"),
    (r"openstax_astronomy2e_ccby_63157f3.jsonl.gz [line 2, text]: holds no words", "module left out"),
    (r"Cut.json.gz: cannot be read", "organism left out"),
    (r"Unknown.json [R0]: names unknown species", "organism left out"),
    (r"Idle.json [objective]: absent", "organism left out"),
    (r"Empty.json [listOfReactions]: empty network", "organism left out"),
    (r"Page.xml: is not SBML", "organism left out"),
    (r"Missing.xml.gz: is missing", "organism left out"),
    (r"organisms.csv [Nowhere.json]: Nowhere species has no known growth range", "organism left out"),
    (r"Mars_geo_albedo.txt.gz: cannot be read", "spectrum left out"),
    (r"p1_g0.txt [# Wave/freq]: no such header line", "spectrum left out"),
    (r"page.parquet: is not a Parquet table", "table of spectra left out"),
    (r"LICENSES.md: is missing", "licences"),
)


def test_bad_files_are_listed_and_stop_nothing(built: tuple[Path, list[str]]) -> None:
    _, problems = built
    for what, rule in EXPECTED:
        assert any(what in p and rule in p for p in problems), f"{what} ... {rule}\nnot in\n" + "\n".join(problems)
    absent = [p for p in problems if not any(what in p for what, _ in EXPECTED)]
    assert all("spectra/vpl" in p for p in absent), absent


def test_what_remains_is_sound_and_loads(built: tuple[Path, list[str]]) -> None:
    output, problems = built
    assert check(output) == []
    bundle = data.load(output)
    store = bundle.train.store
    assert set(store.planets) == {f"p{k}_g0" for k in range(SYSTEMS)}
    assert set(store.organisms) == {*GENERA, "Large"}
    assert store.organisms["Large"].graph.num_nodes == 5001
    assert len(bundle.train) > 0
    assert bool(store.planets["p0_g0"].spectrum_mask.all())
    assert not bool(store.planets["p1_g0"].spectrum_mask.any())
    assert set(store.library) == {"p0_g0", "geexhp_dados2:0", "geexhp_datagen3:0", "geexhp_datagen3:1"}
    spectrum, mask = store.library["geexhp_dados2:0"]
    assert (spectrum.shape, int(mask.sum())) == ((256, 2), 196)
    names = bundle.spec.planet_param_names
    masked = {n for n, known in zip(names, store.planets["p2_g0"].params_mask.tolist(), strict=True) if not known}
    assert masked == {"star_mass", "star_radius", "star_metallicity", "star_age", "log10_orbital_period"}
    assert json.loads((output / "manifest.json").read_text())["left_out"] == problems
    row = open_pack(output).climates[0]
    assert row.toa_imbalance_label == pytest.approx(-1.0)
    assert row.ts_drift == pytest.approx(1.0, abs=0.1)


def test_parts_by_table_and_by_name(built: tuple[Path, list[str]], raw: Path, tmp_path: Path) -> None:
    parts = {row.name: row for row in open_pack(built[0]).parts}
    assert set(parts) == {*(f"Star {k}" for k in range(SYSTEMS)), *GENERA, "Large"}  # nobody who is not there
    assert (parts["Ff"].part, parts["Ff"].source) == ("validation", "table")
    assert {row.source for name, row in parts.items() if name != "Ff"} == {"name"}
    held = {name for name, row in parts.items() if row.part == "test"}
    assert held == {"Star 3", "Star 6", "Aa", "Cc"}
    other = tmp_path / "raw"
    (other / "tables").mkdir(parents=True)
    (other / "climate").symlink_to(raw / "climate")
    for text, message in (
        ("kind,name\n", r"split\.csv \[part\]: column absent"),
        ("kind,name,part\ngenus,Aa,training\n", r"\[line 2, part\]: is 'training', expected one of"),
        ("kind,name,part\nspecies,Aa,test\n", r"\[line 2, kind\]: is 'species'"),
        ("kind,name,part\ngenus,Aa,test\ngenus,Aa,train\n", r"\[Aa\]: the genus is listed more than once"),
        ("\xff", "is no table"),
    ):
        (other / "tables/split.csv").write_text(text, encoding="latin-1")
        with pytest.raises(data.DataError, match=message):
            build(other, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_pack_is_replaced_by_a_whole_one_only(raw: Path, built: tuple[Path, list[str]], tmp_path: Path) -> None:
    old = Path(shutil.copytree(built[0], tmp_path / "pack"))
    (tmp_path / "raw/climate").mkdir(parents=True)
    (tmp_path / "raw/climate/p0_g0_test_seg1.nc").write_text(PAGE)
    with pytest.raises(data.DataError, match="no usable climate file"):
        build(tmp_path / "raw", old)
    assert check(old) == []
    build(raw, old, workers=2)
    assert check(old) == []
    assert set(data.load(old).train.store.library) == {"p0_g0"}  # built without the tables
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["pack", "raw"]


def test_labels_from_the_raw_files(raw: Path, built: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    output, _ = built
    pack = open_pack(output)
    assert len({p.fraction for p in pack.pairs}) > 5
    assert recomputed(pack, raw, 20, seed=1) == []
    assert main(["check", str(output), "--raw", str(raw), "--pairs", "5"]) == 0
    assert "5 pairs recomputed" in capsys.readouterr().out


def test_wrong_labels_and_changed_raw_files_are_found(raw: Path, built: tuple[Path, list[str]], tmp_path: Path) -> None:
    pack: Pack = open_pack(built[0])
    wrong = [dataclasses.replace(p, fraction=p.fraction + 1e-12) for p in pack.pairs]
    problems = recomputed(dataclasses.replace(pack, pairs=tuple(wrong)), raw, 6, seed=0)
    assert len(problems) == 6
    assert all("from the raw files" in p for p in problems)
    other = tmp_path / "raw"
    (other / "climate").mkdir(parents=True)
    (other / "metabolic").symlink_to(raw / "metabolic")
    for path in (raw / "climate").glob("*"):
        (other / "climate" / path.name).symlink_to(path)
    for name in ("p0_g0_test_seg2.nc", "p2_g0_test_seg2.nc"):
        (other / "climate" / name).unlink()
    (other / "climate/p0_g0_test_seg2.nc").write_bytes((raw / "climate/p3_g0_test_seg2.nc").read_bytes())
    text = "\n".join(recomputed(pack, other, len(pack.pairs), seed=0))
    assert "p0_g0_test_seg2.nc [sha256]" in text
    assert "p2_g0_test_seg2.nc: is missing" in text


@pytest.mark.skipif("ASTROBIOGEN_RAW" not in os.environ, reason="ASTROBIOGEN_RAW does not name a folder of raw files")
def test_labels_of_the_bundled_pack_from_its_raw_files() -> None:
    assert recomputed(open_pack(SAMPLE_FOLDER), Path(os.environ["ASTROBIOGEN_RAW"]), 20, seed=0) == []


def test_the_command_builds_where_nobody_says(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--raw", str(raw), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "left out or masked: climate/p1_g1_test_seg1.nc [hus]: variable absent" in shown.out
    assert shown.out.splitlines()[-1].startswith("datasets/habitat: 7 climates, 8 organisms, 56 pairs; ")
    assert "split: star systems 4 train, 1 validation, 2 test; genera 4 train, 2 validation, 2 test" in shown.err
    assert main(["check", "datasets/habitat"]) == 0
    assert main(["describe", "datasets/habitat", "--output", "plots"]) == 0
    assert "| train | Star 1, Star 2, Star 4, Star 5 | Bb, Dd, Ee, Large |" in capsys.readouterr().out
    assert main(["export", "datasets/habitat", "--output", "climates.nc"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["climates.nc", "datasets", "plots"]


def test_commands_tell_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["build", "--raw", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "[climate]: folder absent" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    (tmp_path / "climate").mkdir()
    assert main(["build", "--raw", str(tmp_path), "--output", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full/thesis.tex").exists()
    assert "nothing was changed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["build", "--raw", "x", "--output", "y", "--workers", "0"])
    assert caught.value.code == 2
    assert main(["--help"]) == 0
    assert "make-climate" in capsys.readouterr().out
    assert main(["bild"]) == 2
    assert "unknown command 'bild'" in capsys.readouterr().err


def test_a_pack_may_be_all_test(raw: Path, tmp_path: Path) -> None:
    """One planet and two organisms, all placed in the test part; and what lies outside the raw folder stays there."""
    own = tmp_path / "raw"
    for name in ("tables", "text", "spectra/psg", "spectra/vpl", "climate", "metabolic/sbml"):
        (own / name).mkdir(parents=True)
    for segment in (1, 2):
        shutil.copy(raw / f"climate/p0_g0_test_seg{segment}.nc", own / "climate")
    (own / "climate/p0_g1_test_seg1.nc.gz").write_bytes(b"")
    (own / "tables/planets.csv").write_text("prefix,name,star_system\np0,Planet 0,Star 0\n")
    (own / "tables/split.csv").write_text(
        "kind,name,part\nstar_system,Star 0,test\ngenus,Aa,test\ngenus,Bb,test\n"
    )  # fmt: skip
    outside = tmp_path / "outside.json"
    outside.write_bytes(network(12, True))
    for genus in ("Aa", "Bb"):
        shutil.copy(raw / f"metabolic/sbml/{genus}.json", own / "metabolic/sbml")
    rows = ["Aa.json,Aa species,B,20,,,", "Bb.json,Bb species,B,310.15,,,", "Bb.json,Bb species,B,25,,,",
            "../../../outside.json,Oo species,B,25,,,", f"{outside},Oo species,B,25,,,", "Short"]  # fmt: skip
    header = "file_gz,species,domain,ogt_c,corkrey_obs,corkrey_tmin,corkrey_tmax"
    (own / "metabolic/organisms.csv").write_text("\n".join([header, *rows]) + "\n")
    problems = "\n".join(build(own, tmp_path / "pack", workers=1))
    for said in (
        "no training pair",
        "p0_g1_test_seg1.nc.gz",
        "ogt_c]: is 310.15, expected -50 to 150 degrees C",
        "[../../../outside.json]: is no name of a file",
        f"[{outside}]: is no name",
        "[Short]: says nothing",
    ):
        assert said in problems, (said, problems)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.json", "pack", "raw"]
    bundle = data.load(tmp_path / "pack")
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (0, 0, 2)
    assert bundle.spec.cube_mean == open_pack(SAMPLE_FOLDER).spec.cube_mean
    assert [problem for problem in check(tmp_path / "pack") if "text" not in problem] == []


def test_raw_files_are_checked_without_a_build(
    raw: Path, built: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the check says of climates and networks is what the build then says, but for growth, which it computes."""
    before = sorted(path for path in raw.rglob("*"))
    assert main(["check", "--raw", str(raw)]) == 1
    said = capsys.readouterr().out
    assert sorted(path for path in raw.rglob("*")) == before, "nothing is written"
    kinds = ("climate left out", "organism left out")
    expected = [line for line in built[1] if line.endswith(kinds) and "does not grow" not in line]
    assert len(expected) > 15
    found = [line.removeprefix("PROBLEM ") for line in said.splitlines() if line.endswith(kinds)]
    assert sorted(found) == sorted(expected)
    assert "7 climates and 8 networks can be used" in said
    assert main(["check", "--raw", str(raw / "climate")]) == 2
