"""Files and answers from elsewhere: names that lead out, pipes, devices, archives that unpack without end, entities,
addresses that are not secure, bytes that were changed on their way.
"""

import gzip
import hashlib
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from astrobiogen import data
from astrobiogen.data.storage import container, guarded
from astrobiogen.data.storage.pack import read_manifest, verified_bytes
from astrobiogen.datatools.builders import spectra
from astrobiogen.datatools.climates.climate import opened
from astrobiogen.datatools.climates.store import ClimateStore
from astrobiogen.datatools.fetch import biomodels, climates, oec
from astrobiogen.datatools.fetch.download import Web, differs, stated_checksums
from astrobiogen.datatools.files import unpacked
from astrobiogen.datatools.networks import sbml
from tests.data.test_fetch import FILES, NETCDF, SBML, SYSTEMS, WEB, Server, server

__all__ = ["server"]  # the fixture
HEAD = b'<?xml version="1.0"?>'


def entry(data_: bytes) -> dict[str, object]:
    return {"bytes": len(data_), "sha256": hashlib.sha256(data_).hexdigest()}


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", "link"])
def test_names_that_lead_out_of_a_pack_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(data.DataError, match=r"no name of a file inside|leads out"):
        verified_bytes(root, name, {"files": {name: entry(b"x")}})


def test_pipes_devices_and_damaged_entries_of_a_pack_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, message in (("pipe", "a pipe"), ("zero", "leads out")):
        with pytest.raises(data.DataError, match=message):
            verified_bytes(tmp_path, name, {"files": {name: entry(b"")}})
        with pytest.raises(data.DataError, match=r"a pipe|a device"):
            unpacked(tmp_path / name)
        with pytest.raises(data.DataError, match=r"a pipe|a device"):
            container.read_arrays(tmp_path / name)
    for broken in ({}, {"bytes": "3", "sha256": ""}, {"bytes": 3}, 3, None):
        with pytest.raises(data.DataError, match=r"lacks 'bytes' or 'sha256'|is not listed"):
            verified_bytes(tmp_path, "a", {"files": {"a": broken}})
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(data.DataError, match="a pipe"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(data.DataError, match="cannot be read"):
        read_manifest(tmp_path)


def packed_zeros(path: Path, stated: list[int], unpacked_bytes: int) -> None:
    """A container whose array states a shape and whose blob unpacks to so many zeros."""
    packer = lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=container._FILTERS)
    piece = bytes(2**20)
    blob = b"".join([packer.compress(piece) for _ in range(unpacked_bytes // len(piece))] + [packer.flush()])
    item = {"name": "a", "dtype": "int8", "shape": stated, "coding": "raw", "offset": 0, "bytes": len(blob)}
    header = json.dumps({"arrays": [item | {"notes": {}}], "attributes": {}}).encode()
    path.write_bytes(container.MAGIC + len(header).to_bytes(4, "little") + header + blob)


@pytest.mark.parametrize("shape", [[17 * 2**30], [2**40, 2**40], [2**20, 17 * 2**10]])
def test_a_pack_file_that_states_gigabytes_is_refused_from_its_header(tmp_path: Path, shape: list[int]) -> None:
    packed_zeros(tmp_path / "a.bin", shape, 2**20)
    tracemalloc.start()
    with pytest.raises(data.DataError, match=r"bytes unpacked, expected at most 1073741824"):
        container.read_arrays(tmp_path / "a.bin")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("stated", [1000, 2**20 + 1])
def test_a_blob_that_is_not_as_large_as_its_header_states_is_refused(tmp_path: Path, stated: int) -> None:
    packed_zeros(tmp_path / "a.bin", [stated], 2**26 if stated == 1000 else 2**20)
    contents = container.read_arrays(tmp_path / "a.bin")
    tracemalloc.start()
    with pytest.raises(data.DataError, match="unpacks to"):
        _ = contents.arrays["a"]
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # LZMA's dictionary is 8
    tracemalloc.stop()


def test_too_large_arrays_are_not_written_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MOST_UNPACKED", 100)
    with pytest.raises(data.DataError, match="104 bytes unpacked, expected at most 100"):
        container.write_arrays(tmp_path / "a.bin", {"a": np.zeros(13)}, {})
    assert not (tmp_path / "a.bin").exists()


def test_archives_are_unpacked_up_to_a_bound() -> None:
    words = os.urandom(5000)
    assert guarded.gunzip(gzip.compress(words[:2000]) + gzip.compress(words[2000:]) + bytes(7), 5000) == words
    assert guarded.unxz(lzma.compress(words), 5000) == words
    tracemalloc.start()
    for unpack, packed in ((guarded.gunzip, gzip.compress(bytes(2**26))), (guarded.unxz, lzma.compress(bytes(2**26)))):
        tracemalloc.reset_peak()
        with pytest.raises(ValueError, match="unpacks to more than 1000 bytes"):
            unpack(packed, 1000)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()
    for damaged in (gzip.compress(words)[:-9], gzip.compress(words) + gzip.compress(words)[:50]):
        with pytest.raises(EOFError):
            guarded.gunzip(damaged)
    for damaged in (lzma.compress(words)[:-9], lzma.compress(words)[:40]):
        with pytest.raises(lzma.LZMAError):
            guarded.unxz(damaged, 5000)
    with pytest.raises(ValueError, match="follow the end"):
        guarded.unxz(lzma.compress(words) + b"more", 5000)
    greedy = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**30}])
    with pytest.raises(lzma.LZMAError):
        guarded.unxz(greedy, 5000)


def laughs(root: str) -> str:
    lines = ['<!ENTITY a0 "ha">', *(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12))]
    return f'<?xml version="1.0"?><!DOCTYPE {root} [{"".join(lines)}]><{root}>&a11;</{root}>'


_HOSTILE: dict[str, Callable[[str], str]] = {
    "entities that expand": laughs,
    "a file of the system": lambda root: (
        f'<?xml version="1.0"?><!DOCTYPE {root} [<!ENTITY f SYSTEM "file:///etc/hostname">]><{root}>&f;</{root}>'
    ),
    "elements without end": lambda root: f'<?xml version="1.0"?><{root}>{"<a>" * 50_000}{"</a>" * 50_000}</{root}>',
}


@pytest.mark.parametrize("make", _HOSTILE.values(), ids=_HOSTILE.keys())
def test_hostile_xml_is_refused_before_it_is_parsed(make: Callable[[str], str], tmp_path: Path) -> None:
    message = "declares a document type|nests more than 200"
    for body in (make("systems").encode(), gzip.compress(make("systems").encode())):
        with pytest.raises(data.DataError, match=message):
            oec.parse(body, "systems.xml")
    with pytest.raises(data.DataError, match="not the catalogue's XML"):
        oec.parse(make("systems").encode("utf-16"), "systems.xml")
    for name in ("a.xml", "a.xml.gz"):
        text = make("sbml").encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        with pytest.raises(data.DataError, match=message):
            sbml.read_text(tmp_path / name)


def test_ordinary_xml_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(SBML)
    assert sbml.read_text(tmp_path / "a.xml").encode() == SBML
    assert guarded.xml_problem('<a><!-- <b> <!DOCTYPE x> --><c d="e > f"/>' + '<c d="x->y"/>' * 500 + "</a>") == ""
    assert len(oec.parse(SYSTEMS)[0]) > 0


@pytest.mark.parametrize("url", ["http://example.org/a", "http://127.0.0.1.example.org/a", "http://10.0.0.1/a"])
def test_only_secure_addresses_are_asked(url: str) -> None:
    with pytest.raises(data.DataError, match="is not https"):
        WEB.get(url)


def test_redirects_to_insecure_addresses_are_not_followed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(self: Server, _form: str) -> None:
        self.send_response(302)
        self.send_header("Location", "http://example.org/a")
        self.end_headers()

    monkeypatch.setattr(Server, "reply", redirect)
    with pytest.raises(data.DataError, match=r"redirects to http://example\.org/a, which is not https"):
        WEB.get(f"{server}/a")


def test_checksums_that_a_listing_states_are_compared(server: str, tmp_path: Path) -> None:
    listed = json.loads(FILES)
    name = listed["main"][0]["name"]
    for digest, good in ((hashlib.sha256(SBML).hexdigest(), True), ("0" * 64, False)):
        listed["main"][0]["sha256sum"] = digest
        Server.answers |= {
            "/model/files/MODEL1?format=json": (200, json.dumps(listed).encode()),
            f"/model/download/MODEL1?filename={name}": (200, SBML),
        }
        done = biomodels.fetch(tmp_path / digest, WEB, ["MODEL1"], server)
        assert len(done.paths) == good
        assert good or "has sha256" in done.problems[0]
    resources = [
        {"url": f"{server}/f/good.nc", "hash": f"md5:{hashlib.md5(NETCDF).hexdigest()}"},
        {"url": f"{server}/f/bad.nc", "hash": "0" * 40},
        {"url": "http://example.org/plain.nc", "hash": ""},
    ]
    page = {"success": True, "result": {"count": 1, "results": [{"resources": resources}]}}
    path = "/api/3/action/package_search?fq=organization:thai&rows=100&start=0"
    Server.answers |= {path: (200, json.dumps(page).encode())}
    Server.answers |= {f"/f/{name}.nc": (200, NETCDF) for name in ("good", "bad")}
    done = climates.fetch("thai", tmp_path, WEB, "", server)
    assert [found.name for found in done.paths] == ["good.nc"]
    assert "the source states 0000000000000000" in done.problems[0]
    assert "is not https" in done.problems[1]
    assert [found.name for found in (tmp_path / "climate-thai").iterdir()] == ["good.nc"]
    assert stated_checksums({"a": "sha1:" + "0" * 32, "b": "g" * 40, "c": None, "d": "A" * 40}, "abcd") == {
        "sha1": "a" * 40
    }
    assert differs(b"", {}) == ""


def test_an_answer_without_end_is_cut_off(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astrobiogen.datatools.fetch.download.MOST_HELD", 100)
    Server.answers["/a"] = (200, bytes(101))
    with pytest.raises(data.DataError, match="sends more than 100 bytes"):
        Web(retries=1).get(f"{server}/a")


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_climate_file_of_kilobytes_that_states_gigabytes_is_refused_from_its_headers(
    tmp_path: Path, suffix: str
) -> None:
    """Chunks that were never written take no room; reading the variable would fill the memory."""
    path = tmp_path / f"cube{suffix}"
    if suffix == ".nc":
        netcdf = pytest.importorskip("netCDF4")
        with netcdf.Dataset(path, "w") as file:
            for name, size in (("time", 2**17), ("lat", 256), ("lon", 512)):
                file.createDimension(name, size)
            file.createVariable("ts", "f4", ("time", "lat", "lon"), zlib=True, chunksizes=(1, 256, 512))
    else:
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(path, mode="w", zarr_format=2)
        made = group.create_array("ts", shape=(2**17, 256, 512), chunks=(1, 256, 512), dtype="f4")
        made.attrs["_ARRAY_DIMENSIONS"] = ["time", "lat", "lon"]
    with pytest.raises(data.DataError, match=r"states a variable of 68719476736 bytes in \d+ bytes"), opened(path):
        pass
    with pytest.raises(data.DataError, match="climate store"):
        ClimateStore(path)


def test_a_table_of_spectra_of_kilobytes_that_unpacks_to_gigabytes_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list of numbers that all rows repeat: a dictionary and run lengths in the file."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.DictionaryArray.from_arrays(np.zeros(4096, np.int32), [",".join(["0.5"] * 2**10)])
    path = tmp_path / "spectra.parquet"
    parquet.write_table(arrow.table({"wavelength": column, "albedo": column}), path)
    assert path.stat().st_size < 2**16
    monkeypatch.setattr(spectra, "_PSG_MOST", 2**20)
    with pytest.raises(data.DataError, match="holds more than 1048576 numbers or letters"):
        spectra.read_psg_table(path)
