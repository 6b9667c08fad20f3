"""Tables of PSG spectra: excerpts of two real files, faults, and the build option."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from astrobiogen import data
from astrobiogen.datatools.builders import spectra
from astrobiogen.datatools.builders.spectra import read_psg, read_psg_table

RECORDED = Path(__file__).parent / "recorded"


def test_a_table_with_texts_of_numbers() -> None:
    found = read_psg_table(RECORDED / "geexhp_dados2.parquet")
    assert list(found) == ["geexhp_dados2:0"]
    albedo, mask = found["geexhp_dados2:0"]
    edges = spectra.wavelength_edges()
    assert mask.tolist() == ((edges[1:] > 0.37) & (edges[:-1] < 1.7997)).tolist()  # 0.37 to 1.80 um, RP 1000
    row = pq.read_table(RECORDED / "geexhp_dados2.parquet").to_pylist()[0]
    wave, values = (np.array(row[c].split(","), float) for c in ("WAVELENGHT", "ALBEDO"))
    k = 100
    inside = (wave >= edges[k]) & (wave < edges[k + 1])
    assert inside.sum() > 3
    assert albedo[k] == pytest.approx(values[inside].mean(), rel=1e-6)


def test_a_table_with_lists_agrees_with_the_answer_as_text() -> None:
    found = read_psg_table(RECORDED / "geexhp_datagen3.parquet")
    assert list(found) == ["geexhp_datagen3:0", "geexhp_datagen3:1"]
    albedo, mask = found["geexhp_datagen3:0"]
    text, text_mask = read_psg(RECORDED / "psg_exo0_rif.txt")
    np.testing.assert_array_equal(mask, text_mask)
    np.testing.assert_allclose(albedo[mask], text[mask], rtol=1e-5)  # six digits in the text
    assert not np.allclose(albedo, found["geexhp_datagen3:1"][0])


Table = dict[str, list[Any]]


def _without_albedo(table: Table) -> None:
    table["A"] = table.pop("Total [I/F apparent albedo]")


def _set(column: str, value: Any) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table[column][1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_albedo, r"\[wavelength, albedo\]: absent; the columns are"),
        (_set("GENERATOR-RADUNITS", "Wsrm2um"), r"\[row 1, GENERATOR-RADUNITS\]: is 'Wsrm2um', expected 'rif'"),
        (_set("GENERATOR-RANGEUNIT", "cm"), r"\[row 1, GENERATOR-RANGEUNIT\]: is 'cm', expected 'um'"),
        (_set("Total [I/F apparent albedo]", [0.1]), r"\[row 1, albedo\]: 1 values for 109 wavelengths"),
        (_set("Total [I/F apparent albedo]", [float("nan")] * 109), r"\[row 1, albedo\]: holds non-finite"),
        (_set("Wave/freq [um]", [900.0 + k for k in range(109)]), r"\[row 1, wavelength\]: 900 to 1008 um, none"),
    ],
)
def test_bad_tables(tmp_path: Path, change: Callable[[Table], None], message: str) -> None:
    table = pq.read_table(RECORDED / "geexhp_datagen3.parquet").to_pydict()
    change(table)
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(data.DataError, match=rf"bad\.parquet {message}"):
        read_psg_table(tmp_path / "bad.parquet")


def test_texts_that_are_no_numbers_and_damaged_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"wave": ["0.4, 0.5"], "albedo": ["0.1, oops"]}), tmp_path / "words.parquet")
    with pytest.raises(data.DataError, match=r"words\.parquet \[row 0\]: is no list of numbers"):
        read_psg_table(tmp_path / "words.parquet")
    raw = (RECORDED / "geexhp_dados2.parquet").read_bytes()
    for name, body in (("cut", raw[: len(raw) // 2]), ("page", b"<html>503</html>"), ("empty", b"")):
        (tmp_path / f"{name}.parquet").write_bytes(body)
        with pytest.raises(data.DataError, match=rf"{name}\.parquet: is not a Parquet table"):
            read_psg_table(tmp_path / f"{name}.parquet")
    with pytest.raises(data.DataError, match="is not a Parquet table"):
        read_psg_table(tmp_path / "none.parquet")


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="pyarrow")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(data.DataError, match=r"needs the package pyarrow: pip install 'astrobiogen\[psg\]'"):
        read_psg_table(RECORDED / "geexhp_dados2.parquet")
