"""Fetchers against a local server that sends recorded bodies (``recorded/README.md`` says whence); no real service is
asked.

Recorded: two systems of the Open Exoplanet Catalogue, an answer of BioModels' search, its file list of one model and
the SBML of another, a table of PSG spectra, a netCDF file, names of the ROCKE-3D portal in an Apache server's pages, an
answer of a CKAN catalogue (not of THAI's). Written by hand: cases beyond these, and the header lines of the PSG answer,
whose numbers are recorded.
"""

import csv
import gzip
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import xarray as xr

from astrobiogen import data
from astrobiogen.datatools.builders.spectra import read_psg
from astrobiogen.datatools.climates.planets import read_catalogue
from astrobiogen.datatools.fetch import biomodels, climates, download, oec, run
from astrobiogen.datatools.fetch.download import Web

WEB = Web(timeout=5.0, retries=2, first_pause=0.01)
PAGE = b"<!DOCTYPE html><html><body>Service temporarily unavailable</body></html>"
RECORDED = Path(__file__).parent / "recorded"
SYSTEMS = (RECORDED / "oec_systems.xml").read_bytes()
FILES = (RECORDED / "biomodels_files_BIOMD0000001077.json").read_bytes()
SEARCH = (RECORDED / "biomodels_search_glucose.json").read_bytes()
SBML = gzip.decompress((RECORDED / "BIOMD0000001064.xml.gz").read_bytes())
SPECTRUM = (RECORDED / "psg_exo0_rif.txt").read_bytes()
NETCDF = (RECORDED / "earth_g2_ts.nc").read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers from a table of path -> (status, body); what was asked is kept. An address below ``/old`` answers with a
    redirect that loses the query, and there JSON comes only to those who accept it, as BioModels does.
    """

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    cut = False

    def do_GET(self) -> None:
        self.reply("")

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def reply(self, form: str) -> None:
        path = urllib.parse.unquote_plus(self.path)
        self.asked.append(f"{path} {urllib.parse.unquote_plus(form)}".strip())
        if path.startswith("/old/"):
            self.send_response(301)
            self.send_header("Location", "/new/" + self.path.removeprefix("/old/").split("?")[0])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, body = self.answers.get(path, (404, PAGE))
        if path.startswith("/new/") and b"<sbml" not in body and self.headers["Accept"] != "application/json":
            body = PAGE
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.cut else body)

    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def server() -> Iterator[str]:
    Server.answers, Server.asked, Server.cut = {}, [], False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))  # seconds between looks for the end
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


def test_catalogue(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Server.answers["/systems.xml.gz"] = (200, gzip.compress(SYSTEMS))
    assert run.main(["oec", "--raw", str(tmp_path), "--url", f"{server}/systems.xml.gz"], WEB) == 0
    assert "not been verified" in capsys.readouterr().err
    rows = read_catalogue(tmp_path / "tables/oec_planets.csv.gz")
    assert set(rows) == {"TRAPPIST-1 e", "TRAPPIST-1 h", "Kepler-16 (AB) b"}
    assert rows["TRAPPIST-1 e"] == {
        "name": "TRAPPIST-1 e", "system": "TRAPPIST-1", "distance_pc": "12.1", "st_teff_k": "2559",
        "st_mass_sun": "0.0802", "st_rad_sun": "0.117", "st_met": "0.04", "st_age_gyr": "", "st_spt": "M8 V",
        "pl_rad_jup": "0.0819", "pl_mass_jup": "0.0008", "pl_period_d": "6.099570", "pl_sma_au": "0.02818",
        "pl_ecc": "0.007", "pl_teq_k": "251.3", "method": "transit", "year": "2017", "status": "Confirmed planets",
    }  # fmt: skip
    binary = rows["Kepler-16 (AB) b"]
    assert binary["st_mass_sun"] == ""  # two stars: neither is "the" star
    assert (binary["pl_period_d"], binary["status"]) == ("228.776", "Confirmed planets")
    with gzip.open(tmp_path / "text/oec_descriptions.jsonl.gz", "rt") as handle:
        texts = [json.loads(line) for line in handle]
    assert [t["planet"] for t in texts] == ["TRAPPIST-1 e", "Kepler-16 (AB) b"]
    assert texts[1]["text"].startswith("Kepler-16 (AB) b is a circum-binary planet. It is orbiting two stars.")
    for body in (PAGE, gzip.compress(SYSTEMS)[:100], b"<systems></systems>", b""):
        with pytest.raises(data.DataError, match=r"systems\.xml"):
            oec.parse(body, "systems.xml")
    before = (tmp_path / "tables/oec_planets.csv.gz").read_bytes()
    Server.answers["/systems.xml.gz"] = (200, PAGE)
    with pytest.raises(data.DataError, match="is a web page, not data"):
        oec.fetch(tmp_path, WEB, f"{server}/systems.xml.gz")
    assert (tmp_path / "tables/oec_planets.csv.gz").read_bytes() == before


def test_networks(server: str, tmp_path: Path) -> None:
    main = "Adlung2021 _model_jakstat_pa.xml"  # with the space that it has; the fourth file is .xml too but not main
    Server.answers |= {
        "/model/files/BIOMD0000001077?format=json": (200, FILES),
        f"/model/download/BIOMD0000001077?filename={main}": (200, SBML),
        "/model/files/MODEL2?format=json": (200, FILES),
        f"/model/download/MODEL2?filename={main}": (200, b"PK\x03\x04zip"),
        "/model/files/MODEL3?format=json": (200, b'{"main": []}'),
        "/model/files/MODEL5?format=json": (200, PAGE),
    }
    (path,) = biomodels.fetch(tmp_path, WEB, ["BIOMD0000001077"], server).paths
    assert gzip.decompress(path.read_bytes()) == SBML
    asked = len(Server.asked)
    biomodels.fetch(tmp_path, WEB, ["BIOMD0000001077"], server)
    assert len(Server.asked) == asked  # it is there already
    bad = {
        "MODEL2": "is not SBML",
        "MODEL3": "lists no .xml",
        "MODEL4": "HTTP status 404",
        "MODEL5": "is a web page, not data",
        "../MODEL6": "is no BioModels id",
    }
    done = biomodels.fetch(tmp_path, WEB, [*bad, "BIOMD0000001077"], server)  # a bad one stops no other
    assert done.paths == [path]
    assert len(done.problems) == len(bad)
    for (name, message), problem in zip(bad.items(), done.problems, strict=True):
        assert name in problem
        assert message in problem
    assert [p.name for p in (tmp_path / "metabolic/sbml").iterdir()] == [path.name]
    with pytest.raises(data.DataError, match="no answer"):
        biomodels.fetch(tmp_path, WEB, ["MODEL7", "MODEL8"], "http://127.0.0.1:9")


def test_networks_behind_the_redirect_of_the_old_addresses(server: str, tmp_path: Path) -> None:
    Server.answers |= {
        "/new/model/files/BIOMD0000001077": (200, FILES),
        "/new/model/download/BIOMD0000001077": (200, SBML),
        "/new/search": (200, SEARCH),
    }
    done = biomodels.fetch(tmp_path, WEB, ["BIOMD0000001077"], f"{server}/old")
    assert done.problems == []
    assert gzip.decompress(done.paths[0].read_bytes()) == SBML
    assert "/new/model/files/BIOMD0000001077" in Server.asked  # without format=json: the Accept header brought JSON
    assert len(biomodels.search("glucose", WEB, f"{server}/old", limit=2)[0]) == 2


def test_search_of_networks(server: str, capsys: pytest.CaptureFixture) -> None:
    one, rest = "/search?query=glucose&offset=0&numResults=10&format=json", "/search?query=glucose&offset=2"
    Server.answers[one] = (200, SEARCH)
    names = [("MODEL1204270001", "Koenig2012 - Hepatic Glucose Metabolism")]
    names.append(("MODEL1209260000", names[0][1]))
    command = ["biomodels", "--search", "glucose", "--url", server]
    assert run.main([*command, "--limit", "2"], WEB) == 0
    shown = capsys.readouterr()
    assert [tuple(line.split("\t")) for line in shown.out.splitlines()] == names
    assert "2 of 173 models that match" in shown.err
    assert run.main([*command, "--limit", "1"], WEB) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    # the next page is asked for from where the first one ended; an empty one ends the search
    Server.answers[f"{rest}&numResults=10&format=json"] = (200, b'{"matches": 173, "models": []}')
    assert len(biomodels.search("glucose", WEB, server, limit=5)[0]) == 2
    for body, message in (
        (PAGE, "is a web page"),
        (b"[]", "expected an object"),
        (b'{"matches": 3}', "models, matches"),
    ):
        Server.answers[one] = (200, body)
        with pytest.raises(data.DataError, match=message):
            biomodels.search("glucose", WEB, server, limit=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["biomodels", "--raw", "x"], "expected either ids or --search"),
        (["biomodels", "--raw", "x", "MODEL1", "--search", "y"], "expected either ids or --search"),
        (["biomodels", "--search", "y", "--limit", "0"], "--limit: got 0, expected at least 1"),
        (["oec"], "required: --raw"),
        (["thai", "--raw", "x", "--pattern", "("], "is no regular expression"),
        (["nowhere"], "invalid choice: 'nowhere'"),
    ],
)
def test_wrong_options(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(words, WEB)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def serve_portal(server: str) -> str:
    """A folder with one below it, as a web server lists them; its address."""
    links = "".join(f'<a href="{n}">x</a>' for n in ("../", "AIJ/", "https://elsewhere.org/", "X016.aij.nc", "a.txt"))
    below = "".join(f'<a href="{n}">x</a>' for n in ("/runs/", "X016.aijl.nc", "X032.aij.nc"))
    Server.answers |= {
        "/runs/": (200, f"<html>{links}</html>".encode()),
        "/runs/AIJ/": (200, f"<html>{below}</html>".encode()),
        "/runs/X016.aij.nc": (200, NETCDF),
        "/runs/AIJ/X016.aijl.nc": (200, NETCDF),
        "/runs/AIJ/X032.aij.nc": (200, PAGE),
    }
    return f"{server}/runs/"


def serve_catalogue(server: str) -> str:
    """A CKAN catalogue with the same files in two data sets, on two pages of ``package_search``; its address."""
    first = [{"url": f"{server}/f/X016.aij.nc"}, {"url": f"{server}/f/notes.pdf"}, {"url": "file:///etc/X016.nc"}]
    second = [{"url": f"{server}/f/{name}", "format": "NetCDF"} for name in ("X016.aijl.nc", "X032.aij.nc")]
    for start, resources in enumerate((first, second)):
        page = {"success": True, "result": {"count": 2, "results": [{"name": "hab1", "resources": resources}]}}
        path = f"/api/3/action/package_search?fq=organization:thai&rows=100&start={start}"
        Server.answers[path] = (200, json.dumps(page).encode())
    Server.answers |= {
        "/f/X016.aij.nc": (200, NETCDF),
        "/f/X016.aijl.nc": (200, NETCDF),
        "/f/X032.aij.nc": (200, PAGE),
    }
    return server


@pytest.mark.parametrize(("source", "serve"), [("rocke3d", serve_portal), ("thai", serve_catalogue)])
def test_climates_of_a_listing(
    server: str, tmp_path: Path, source: str, serve: Callable[[str], str], capsys: pytest.CaptureFixture
) -> None:
    url = serve(server)
    assert run.main([source, "--raw", str(tmp_path), "--url", url, "--pattern", "^X016"], WEB) == 0
    folder = tmp_path / f"climate-{source}"
    assert sorted(p.name for p in folder.iterdir()) == ["X016.aij.nc", "X016.aijl.nc"]
    with xr.open_dataset(folder / "X016.aij.nc", decode_times=False) as dataset:
        assert dataset["ts"].shape == (2, 32, 64)
    asked = len(Server.asked)
    assert run.main([source, "--raw", str(tmp_path), "--url", url, "--pattern", "^X"], WEB) == 1
    assert "X032.aij.nc [content]: is a web page" in capsys.readouterr().out
    assert len(Server.asked) == asked + 3  # two listings and the file that was not there
    assert sorted(p.name for p in folder.iterdir()) == ["X016.aij.nc", "X016.aijl.nc"]
    with pytest.raises(data.DataError, match="3 netCDF files are listed, none matches"):
        climates.fetch(source, tmp_path, WEB, "Y", url)


def test_the_portal_as_apache_lists_it(server: str, tmp_path: Path) -> None:
    folder = "/GISS_modelE/ROCKE-3D/publication-supplements/Climates_of_Warm_Earth_like_Planets_I/"
    assert climates.ROCKE3D.endswith(folder)
    names = ["amANN0990-0999.aijP211eoDOFP3Od_X001_O30.nc", "amANN0990-0999.aijP211eoDOFP3Od_X064_O30.nc"]
    Server.answers |= {
        folder: (200, (RECORDED / "rocke3d_listing.html").read_bytes()),
        f"{folder}AIJ/": (200, (RECORDED / "rocke3d_listing_AIJ.html").read_bytes()),
        **{f"{folder}AIJ/{name}": (200, NETCDF) for name in names},
    }
    where = f"{server}{folder}"
    assert len(climates.listing("rocke3d", WEB, "", where)) == 8
    done = run.main(["rocke3d", "--raw", str(tmp_path), "--url", where, "--pattern", r"0990.*P211.*_X0\d\d_"], WEB)
    assert done == 0
    assert sorted(p.name for p in (tmp_path / "climate-rocke3d").iterdir()) == names
    assert all("?" not in asked for asked in Server.asked)  # the column heads are links that sort


def test_the_catalogue_as_ckan_answers(server: str) -> None:
    path = "/api/3/action/package_search?fq=organization:thai&rows=100&start=0"
    Server.answers[path] = (200, (RECORDED / "ckan_package_search.json").read_bytes())
    link = "http://127.0.0.1:5000/datastore/dump/6ed8a2fb-f432-43ce-bae7-17684cf8a6bf"
    assert climates.ckan_links(server, WEB) == {link: {}}
    with pytest.raises(data.DataError, match="0 netCDF files are listed"):
        climates.listing("thai", WEB, "", server)


def test_two_files_of_one_name_are_refused(server: str, tmp_path: Path) -> None:
    serve_catalogue(server)
    page = {"result": {"count": 1, "results": [{"resources": [{"url": f"{server}/{k}/a.nc"} for k in "xy"]}]}}
    Server.answers["/api/3/action/package_search?fq=organization:thai&rows=100&start=0"] = (
        200,
        json.dumps(page).encode(),
    )
    with pytest.raises(data.DataError, match=r"2 files are named 'a\.nc'"):
        climates.fetch("thai", tmp_path, WEB, "a", server)
    for body, message in ((PAGE, "is a web page"), (b'{"result": {"results": []}}', "count and results")):
        Server.answers["/api/3/action/package_search?fq=organization:thai&rows=100&start=0"] = (200, body)
        with pytest.raises(data.DataError, match=message):
            climates.fetch("thai", tmp_path, WEB, "a", server)


def test_spectrum(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Server.answers["/api.php"] = (200, SPECTRUM)
    config = tmp_path / "trappist1e_g1.cfg"
    config.write_text("<OBJECT-NAME>TRAPPIST-1 e\n<GENERATOR-RADUNITS>rif\n")
    assert run.main(["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(config)], WEB) == 0
    assert "type=rad" in Server.asked[0]
    assert "<OBJECT-NAME>TRAPPIST-1 e" in Server.asked[0]
    albedo, mask = read_psg(tmp_path / "spectra/psg/trappist1e_g1.txt")
    assert albedo[mask][0] == pytest.approx(2.5e-2, rel=0.03)
    capsys.readouterr()
    config.write_text("<GENERATOR-RADUNITS>Wsrm2um\n")
    other = tmp_path / "earth_g0.cfg"
    other.write_text("<GENERATOR-RADUNITS>rif\n")
    command = ["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(config), str(other), "nothing.cfg"]
    for body, message in (
        (SPECTRUM.replace(b"I/F [apparent albedo]", b"Spectral radiance"), "cannot be used: [Radiance unit] is"),
        (b"ERROR: the limit of requests was reached", "limit of requests"),
    ):
        Server.answers["/api.php"] = (200, body)
        assert run.main(command, WEB) == 1
        problems = capsys.readouterr().out.splitlines()
        assert len(problems) == 3
        for problem, part in zip(problems, ("expected 'rif'", message, "nothing.cfg: is missing"), strict=True):
            assert part in problem
        assert [p.name for p in (tmp_path / "spectra/psg").iterdir()] == ["trappist1e_g1.txt"]


def test_truncated_and_busy_services(server: str, tmp_path: Path) -> None:
    Server.answers |= {"/a": (200, SBML), "/busy": (503, b"")}
    Server.cut = True
    with pytest.raises(data.DataError, match=r"/a: (no answer|truncated)"):
        WEB.save(f"{server}/a", tmp_path / "a", lambda _: "")
    Server.cut = False
    assert len(Server.asked) == WEB.retries
    with pytest.raises(data.DataError, match="HTTP status 503"):
        WEB.get(f"{server}/busy")
    assert len(Server.asked) == 2 * WEB.retries
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(data.DataError, match="no answer"):
        WEB.get("http://127.0.0.1:9/nobody")
    for url in ("nobody", "file:///etc/passwd", ""):
        with pytest.raises(data.DataError, match="is no address of the web"):
            WEB.get(url)
    Server.answers["/ä b.nc"] = (200, b"x")
    assert WEB.get(f"{server}/ä b.nc") == WEB.get(f"{server}/%C3%A4%20b.nc") == b"x"


def test_a_large_file_comes_in_pieces_and_shows_its_progress(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(download, "CHUNK", 1024)
    Server.answers["/a.nc"] = (200, NETCDF)
    WEB.save(f"{server}/a.nc", tmp_path / "a.nc", download.netcdf)
    assert (tmp_path / "a.nc").read_bytes() == NETCDF
    pieces = -(-len(NETCDF) // 1024)
    assert f"a.nc [MiB] {pieces}/{pieces}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"# Wave/freq Total\n", r"\[Spectral unit\]"),
        (b"# Spectral unit: Wavelength [um]\n# Radiance unit: W/m2\n# Wave/freq Total\n1 2\n", r"\[Radiance unit\]"),
        (SPECTRUM.replace(b"Total", b"Planet"), r"\[Total\]"),
        (SPECTRUM + b"0.5 oops 1\n", "no row of numbers"),
        (SPECTRUM.replace(b" 2.53908e-02 ", b" nan ", 1), "non-finite"),
        (SPECTRUM.split(b"4.5")[0], "holds no rows"),
    ],
)
def test_bad_spectra(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "s.txt").write_bytes(text)
    with pytest.raises(data.DataError, match=message):
        read_psg(tmp_path / "s.txt")


def test_table_columns_are_those_of_the_raw_layout() -> None:
    rows, _ = oec.parse(SYSTEMS)
    assert list(csv.DictReader(["name,system,st_teff_k"]).fieldnames or ()) == [oec.COLUMNS[k] for k in (0, 1, 3)]
    assert all(tuple(row) == oec.COLUMNS for row in rows)
