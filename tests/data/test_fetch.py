"""Fetchers against a local server that sends recorded bodies (``recorded/README.md`` says whence); no real service is
asked.

Recorded: two systems of the Open Exoplanet Catalogue, BioModels' file list of one model and the SBML of another, a
table of PSG spectra, a netCDF file. Of these no record was found, and they are written by hand: the listings of the
ROCKE-3D and THAI sites (links as web servers write them), the answer of BioModels' search, and the header lines of
the PSG answer, whose numbers are recorded.
"""

import csv
import gzip
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import xarray as xr

from astrobiogen import data
from astrobiogen.data.builders.planets import read_catalogue
from astrobiogen.data.builders.spectra import read_psg
from astrobiogen.data.fetch import biomodels, climates, oec, run
from astrobiogen.data.fetch.download import Web

WEB = Web(timeout=5.0, retries=2, first_pause=0.01)
PAGE = b"<!DOCTYPE html><html><body>Service temporarily unavailable</body></html>"
RECORDED = Path(__file__).parent / "recorded"
SYSTEMS = (RECORDED / "oec_systems.xml").read_bytes()
FILES = (RECORDED / "biomodels_files_BIOMD0000001077.json").read_bytes()
SBML = gzip.decompress((RECORDED / "BIOMD0000001064.xml.gz").read_bytes())
SPECTRUM = (RECORDED / "psg_exo0_rif.txt").read_bytes()
NETCDF = (RECORDED / "earth_g2_ts.nc").read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers from a table of path -> (status, body); what was asked is kept."""

    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    cut = False

    def do_GET(self) -> None:
        self.reply("")

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def reply(self, form: str) -> None:
        path = urllib.parse.unquote(self.path)
        self.asked.append(f"{path} {urllib.parse.unquote_plus(form)}".strip())
        status, body = self.answers.get(path, (404, PAGE))
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
        thread = threading.Thread(target=made.serve_forever)
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
        "/search?query=methanogen&numResults=100&format=json": (
            200,
            b'{"matches": 1, "models": [{"id": "MODEL1", "name": "iX"}]}',
        ),
    }
    assert biomodels.search("methanogen", WEB, server) == [{"id": "MODEL1", "name": "iX"}]
    (path,) = biomodels.fetch(tmp_path, WEB, ["BIOMD0000001077"], server)
    assert gzip.decompress(path.read_bytes()) == SBML
    asked = len(Server.asked)
    biomodels.fetch(tmp_path, WEB, ["BIOMD0000001077"], server)
    assert len(Server.asked) == asked  # it is there already
    for name, message in (
        ("MODEL2", "is not SBML"),
        ("MODEL3", r"lists no \.xml"),
        ("MODEL4", "HTTP status 404"),
        ("MODEL5", "is a web page, not data"),
    ):
        with pytest.raises(data.DataError, match=message):
            biomodels.fetch(tmp_path, WEB, [name], server)
        assert not (tmp_path / f"metabolic/sbml/{name}.xml.gz").exists()


@pytest.mark.parametrize("source", ["rocke3d", "thai"])
def test_climates_of_a_listing(server: str, tmp_path: Path, source: str) -> None:
    links = "".join(f'<a href="{n}">x</a>' for n in ("../", "AIJ/", "https://elsewhere.org/", "X016.aij.nc", "a.txt"))
    below = "".join(f'<a href="{n}">x</a>' for n in ("/runs/", "X016.aijl.nc", "X032.aij.nc"))
    Server.answers |= {
        "/runs/": (200, f"<html>{links}</html>".encode()),
        "/runs/AIJ/": (200, f"<html>{below}</html>".encode()),
        "/runs/X016.aij.nc": (200, NETCDF),
        "/runs/AIJ/X016.aijl.nc": (200, NETCDF),
        "/runs/AIJ/X032.aij.nc": (200, PAGE),
    }
    assert run.main([source, "--raw", str(tmp_path), "--url", f"{server}/runs/", "--pattern", "^X016"], WEB) == 0
    folder = tmp_path / f"climate-{source}"
    assert sorted(p.name for p in folder.iterdir()) == ["X016.aij.nc", "X016.aijl.nc"]
    with xr.open_dataset(folder / "X016.aij.nc", decode_times=False) as dataset:
        assert dataset["ts"].shape == (2, 32, 64)
    with pytest.raises(data.DataError, match=r"X032\.aij\.nc \[content\]: is a web page"):
        climates.fetch(source, tmp_path, WEB, "X032", f"{server}/runs/")
    assert sorted(p.name for p in folder.iterdir()) == ["X016.aij.nc", "X016.aijl.nc"]
    with pytest.raises(data.DataError, match="3 netCDF files are listed, none matches"):
        climates.fetch(source, tmp_path, WEB, "Y", f"{server}/runs/")


def test_spectrum(server: str, tmp_path: Path) -> None:
    Server.answers["/api.php"] = (200, SPECTRUM)
    config = tmp_path / "trappist1e_g1.cfg"
    config.write_text("<OBJECT-NAME>TRAPPIST-1 e\n<GENERATOR-RADUNITS>rif\n")
    assert run.main(["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(config)], WEB) == 0
    assert "type=rad" in Server.asked[0]
    assert "<OBJECT-NAME>TRAPPIST-1 e" in Server.asked[0]
    albedo, mask = read_psg(tmp_path / "spectra/psg/trappist1e_g1.txt")
    assert albedo[mask][0] == pytest.approx(2.5e-2, rel=0.03)
    config.write_text("<GENERATOR-RADUNITS>Wsrm2um\n")
    with pytest.raises(data.DataError, match="expected 'rif'"):
        run.main(["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(config)], WEB)
    radiance = (RECORDED / "psg_exo0_rif.txt").read_bytes().replace(b"I/F [apparent albedo]", b"Spectral radiance")
    Server.answers["/api.php"] = (200, radiance)
    other = tmp_path / "earth_g0.cfg"
    other.write_text("<GENERATOR-RADUNITS>rif\n")
    with pytest.raises(data.DataError, match=r"cannot be used: \[Radiance unit\] is 'Spectral radiance'"):
        run.main(["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(other)], WEB)
    assert not (tmp_path / "spectra/psg/earth_g0.txt").exists()
    Server.answers["/api.php"] = (200, b"ERROR: the limit of requests was reached")
    with pytest.raises(data.DataError, match="limit of requests"):
        run.main(["psg", "--raw", str(tmp_path), "--url", f"{server}/api.php", str(other)], WEB)
    assert not (tmp_path / "spectra/psg/earth_g0.txt").exists()


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
