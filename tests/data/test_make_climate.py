"""``make-climate`` against a stand-in for the external program: balance, resumption, failures, parameters."""

import csv
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from astrobiogen import data
from astrobiogen.data.__main__ import main
from astrobiogen.datatools.climates import climate
from astrobiogen.datatools.make_climate import jobs, plot
from astrobiogen.datatools.make_climate.parameters import climate_of

# A model that approaches balance: the imbalance halves with every segment; the restart file holds their number.
STAND_IN = """
import os
import time
from collections.abc import Callable
from pathlib import Path
import numpy as np
import netCDF4

class Model:
    def __init__(self, workdir, modelname, resolution, layers, ncpus, precision, outputtype):
        assert (resolution, layers, ncpus, precision, outputtype) == ("T21", 10, 1, 4, ".nc")
        self.work, self.name, self.executable = Path(workdir), modelname, "most_plasim_t21_l10_p1.x"
        self.work.mkdir()
        if not (Path(__file__).parent / "no-compiler").exists():
            (self.work / self.executable).touch()

    def configure(self, flux, restartfile, runsteps, mldepth, timestep, snapshots, **parameters):
        self.age = int(Path(restartfile).read_text()) if restartfile else 0
        assert parameters["aquaplanet"] and parameters["pN2"] == 1.0 and runsteps > 0

    def run(self, years, crashifbroken, clean):
        log = Path(os.environ["STAND_IN_LOG"])
        with log.open("a") as handle:
            handle.write(f"{self.name} {self.age}\\n")
        if (log.parent / "slow").exists():
            time.sleep(60)
        if (log.parent / f"fail-{self.name}-{self.age}").exists():  # as the program does: it moves its files away
            self.work.rename(self.work.parent / (self.name + "_crashed"))
            try:
                raise FloatingPointError("blew up")
            except FloatingPointError:
                raise RuntimeError("ExoPlaSim has crashed or begun producing garbage.")
        toa = 16.0 * 0.5 ** self.age
        with netCDF4.Dataset(self.work / "MOST.00000.nc", "w") as f:
            sizes = {"time": 12, "lev": 10, "lat": 4, "lon": 8}
            for name, size in sizes.items():
                f.createDimension(name, size)
            values = {"time": np.arange(12.0), "lev": np.linspace(0.05, 0.95, 10), "lat": [67.5, 22.5, -22.5, -67.5],
                      "lon": np.arange(8) * 45.0}
            for name, v in values.items():
                c = f.createVariable(name, "f4", (name,)); c[:] = v
                c.units = {"lev": "nondimensional", "time": "timesteps"}.get(name, "deg")
            fields = {"ta": (250.0, "K"), "hus": (0.003, "1"), "ts": (280.0 + 0.02 * toa, "K"), "sic": (0.1, "1"),
                      "ps": (1000.0, "hPa"), "rst": (240.0 + toa, "W m-2"), "rlut": (-240.0, "W m-2"),
                      "junk": (1.0, "1")}
            for name, (v, unit) in fields.items():
                dims = ("time", "lev", "lat", "lon") if name in ("ta", "hus") else ("time", "lat", "lon")
                a = f.createVariable(name, "f4", dims); a[:] = v; a.units = unit
        (self.work / "plasim_restart").write_text(str(self.age + 1))
"""

COLUMNS: tuple[str, ...] = (
    "name",
    "system",
    "st_teff_k",
    "st_mass_sun",
    "st_rad_sun",
    "pl_rad_jup",
    "pl_mass_jup",
    "pl_period_d",
)
# the catalogue's values of TOI-700 d (a858d46), a copy of it, and two that the rule refuses
ROWS = (
    ("TOI-700 d", "TOI-700", "3459", "0.415", "0.424", "0.102", "", "37.42396"),
    ("My World b", "My Star", "4000", "0.6", "0.6", "", "0.006", "80.0"),
    ("Giant b", "Giant", "5000", "1", "1", "1.0", "1.0", "100"),
    ("Vague b", "Vague", "5000", "", "1", "0.1", "", "100"),
)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tables").mkdir()
    lines = "\n".join(",".join(row) for row in (COLUMNS, *ROWS)) + "\n"
    (tmp_path / "tables/oec_planets.csv.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/exoplasim.py").write_text(STAND_IN)
    (tmp_path / "site/exoplasim-3.4.2.dist-info").mkdir()
    (tmp_path / "site/exoplasim-3.4.2.dist-info/METADATA").write_text("Name: exoplasim\nVersion: 3.4.2\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "calls.txt"))
    monkeypatch.setattr(jobs, "_POLL", 0.05)
    return tmp_path


def calls(raw: Path) -> list[str]:
    path = raw / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_runs_to_balance_resumes_and_names_new_planets(raw: Path, capsys: pytest.CaptureFixture) -> None:
    command = [
        "make-climate",
        "--raw",
        str(raw),
        "--planets",
        "TOI-700 d",
        "My World b",
        "--co2",
        "0.01",
        "--jobs",
        "2",
    ]
    key, other = "toi700d_g0_pCO2_0.01bar", "myworldb_g0_pCO2_0.01bar"
    (raw / f"fail-{key}-2").touch()
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "1 balanced, 0 not balanced, 1 failed" in text
    assert f"failed: {key}" in text
    assert "status 1: FloatingPointError: blew up" in text  # the cause, not the program's last word
    assert (raw / f"climate-work/{key}/{key}_crashed").exists()
    before = [line for line in calls(raw) if line.startswith(key)]
    assert before == [f"{key} {k}" for k in range(3)]
    (raw / f"fail-{key}-2").unlink()
    assert main(command) == 0  # continues with segment 2, repeats nothing, and leaves the finished climate alone
    again = [line for line in calls(raw) if line.startswith(key)]
    # |TOA| 16, 8, 4, 2, 1: segments 3 and 4 are the first two within 2 W/m2, the drift is then 0.06 K a year
    assert again == [*before, f"{key} 2", f"{key} 3", f"{key} 4"]
    assert sum(line.startswith(other) for line in calls(raw)) == 5
    found = [climate.read_climate(raw / f"climate/{key}_seg{s}.nc", ("ta", "hus", "ts", "sic")) for s in (1, 2)]
    assert [round(f.toa_imbalance, 4) for f in found] == [2.0, 1.0]
    assert found[0].parameters["pCO2"] == 0.01
    with xr.open_dataset(raw / f"climate/{key}_seg2.nc", decode_times=False) as dataset:
        assert dataset.attrs["converged"] == 1
        # ts is 280 + 0.02 TOA: from segment 2 to 4, which is a year, -0.06 K
        assert dataset.attrs["toa_imbalance"] == pytest.approx(1.0)
        assert dataset.attrs["ts_mean"] == pytest.approx(280.02)
        assert dataset.attrs["ts_drift"] == pytest.approx(-0.06, abs=1e-4)
        assert json.loads(dataset.attrs["acceptance"])["max_drift"] == 0.1
        assert dataset.attrs["source"].startswith("ExoPlaSim 3.4.2, T21L10")
        assert "junk" not in dataset
    assert not (raw / f"climate-work/{key}/{key}_crashed").exists()
    assert (raw / "climate-work/history.png").read_bytes().startswith(b"\x89PNG")
    with (raw / "tables/planets.csv").open() as handle:
        assert list(csv.DictReader(handle)) == [{"prefix": "myworldb", "name": "My World b", "star_system": "My Star"}]
    assert not list((raw / "climate-work" / key).glob("segment-0*"))
    with pytest.raises(data.DataError, match="other parameters"):  # another run must not continue this one
        jobs.Job(
            climate_of(raw / "x", dict(zip(COLUMNS, ROWS[0], strict=True)), 0, 0.01),
            raw / "climate-work" / key, "python", jobs.Settings(segment_days=90.0), "3.4.2",
        ).run(raw / "climate", jobs.threading.Event(), lambda _: None)  # fmt: skip


def test_parallel_runs_use_netcdf_one_at_a_time(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]

    def watched(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.2)
            try:
                return function(*arguments, **options)
            finally:
                inside[0] -= 1

        return call

    monkeypatch.setattr(jobs.climate, "read_climate", watched(climate.read_climate))
    monkeypatch.setattr(jobs.Job, "_publish", watched(jobs.Job._publish))
    command = ["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", "--co2", "0.01", "0.1", "1", "--jobs", "3"]
    assert main(command) == 0
    assert most[0] == 1


def test_unconverged_runs_are_written_and_marked(raw: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", "--co2", "0.01", "--max-years", "1.5"]
    assert main(command) == 1
    assert "not balanced after 1.5 years" in capsys.readouterr().out
    with xr.open_dataset(raw / "climate/toi700d_g0_pCO2_0.01bar_seg2.nc", decode_times=False) as dataset:
        assert dataset.attrs["converged"] == 0
    assert len(calls(raw)) == 3


def test_balance_is_judged_over_a_year() -> None:
    settings = jobs.Settings()
    # a real run, Kepler-1652 b at 0.01 bar of CO2, 5.5 to 7.5 years: the last two segments happen to agree
    figures = [(-1.50, 234.079), (-1.39, 233.849), (-1.39, 233.919), (-1.04, 233.652), (-1.30, 233.702)]
    history = [jobs.Segment(*f) for f in figures]
    assert jobs.drift(history, 4, settings) == pytest.approx(233.702 - 233.919)
    assert not jobs.balanced(history, settings)
    assert jobs.balanced(history, jobs.Settings(max_drift=0.25))
    assert not jobs.balanced(history, jobs.Settings(max_drift=0.25, max_imbalance=1.2))
    assert jobs.drift(history, 1, settings) != jobs.drift(history, 1, settings)  # NaN: the first year is not over
    assert not jobs.balanced(history[:2], jobs.Settings(max_drift=9.0))
    long = jobs.Settings(segment_days=720.0)  # longer than a year: from one segment to the next, per year
    assert jobs.drift(history, 1, long) == pytest.approx((233.849 - 234.079) / 2)


def test_parameters_follow_the_rule(raw: Path, capsys: pytest.CaptureFixture) -> None:
    row = dict(zip(COLUMNS, ROWS[0], strict=True))
    run = climate_of(raw / "oec.csv", row, 1, 0.1)
    assert run.key == "toi700d_g1_pCO2_0.1bar"
    # by hand: a = (0.415 (37.42396 / 365.25)^2)^(1/3) = 0.16332, L = 0.424^2 (3459 / 5772)^4 = 0.023186
    assert run.parameters["flux"] == pytest.approx(1361 * 0.023186 / 0.16332**2, rel=1e-3)
    assert run.parameters["radius"] == pytest.approx(1.143, abs=1e-3)
    assert run.parameters["gravity"] == pytest.approx(9.80665 * 1.1433 ** (1 / 0.279 - 2), rel=2e-3)
    assert run.parameters["synchronous"] is True
    free = climate_of(raw / "oec.csv", dict(zip(COLUMNS, ROWS[1], strict=True)), 0, 0.1).parameters
    assert (free["synchronous"], free["rotationperiod"]) == (False, 1.0)
    heavy = climate_of(raw / "oec.csv", {**row, "pl_mass_jup": "0.08"}, 1, 0.1).parameters  # 25 Earth masses: a limit
    assert heavy["gravity"] == run.parameters["gravity"]
    for name, message in (
        ("TOI 700d", "no such planet; similar: TOI-700 d"),
        ("Giant b", "hardly rocky"),
        ("Vague b", r"st_mass_sun\]: is not in"),
        ("Nix", "no such"),
    ):
        assert main(["make-climate", "--raw", str(raw), "--planets", name, "--dry-run"]) == 2
        assert message.replace("\\", "") in capsys.readouterr().err
    assert main(["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", "--dry-run"]) == 0
    assert "3 climates, at most 40 model years each" in capsys.readouterr().out
    assert calls(raw) == []


def test_absent_program_is_named(raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = ["make-climate", "--raw", str(raw), "--planets", "TOI-700 d"]
    (raw / "site/no-compiler").touch()
    assert main(command) == 2
    assert "most_plasim_t21_l10_p1.x was not built; are gfortran, g++ and make installed?" in capsys.readouterr().err
    (raw / "site/no-compiler").unlink()
    (raw / "site/netCDF4.py").write_text("raise ModuleNotFoundError(\"No module named 'netCDF4'\")")
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "No module named 'netCDF4'" in message
    assert "meson ninja netCDF4 exoplasim" in message
    monkeypatch.setenv("PYTHONPATH", "")
    assert main(command) == 2
    assert "ModuleNotFoundError: No module named 'exoplasim'" in capsys.readouterr().err
    assert main([*command, "--python", str(raw / "nothing")]) == 2
    assert "cannot be started" in capsys.readouterr().err
    assert not (raw / "climate").exists()


def test_a_terminated_command_ends_its_runs_and_continues(raw: Path) -> None:
    (raw / "slow").touch()
    key = "toi700d_g0_pCO2_0.01bar"
    words = ["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", "--co2", "0.01"]
    where = {**os.environ, "PYTHONPATH": f"{Path(data.__file__).parents[2]}{os.pathsep}{raw / 'site'}"}
    command = [sys.executable, "-m", "astrobiogen.data", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=where)
    lock = raw / "climate-work" / key / "lock"
    for _ in range(600):
        if calls(raw):
            break
        time.sleep(0.1)
    assert calls(raw) == [f"{key} 0"]
    again = [sys.executable, "driver.py", "0"]
    second = subprocess.run(again, cwd=lock.parent, capture_output=True, text=True, env=where, check=False)
    assert "another process runs this climate" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert not (raw / "climate-work/history.png").exists()  # no segment has ended yet
    with lock.open("w") as handle:  # free: the running segment has ended too
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (raw / "slow").unlink()
    assert main(words) == 0
    assert calls(raw) == [f"{key} {k}" for k in (0, 0, 1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--segment-days", "15"], "--segment-days: got 15, expected at least 60 (12 means of 5 days)"),
        (["--max-years", "inf"], "--max-years: got inf, expected a positive number"),
        (["--jobs", "0"], "--jobs: got 0, expected a positive number"),
        (["--co2", "0.01", "nan"], "--co2: got nan, expected positive pressures in bar"),
        (["--co2", *["0.01"] * 11], "--co2: got 11 pressures, expected at most 10"),
    ],
)
def test_wrong_options_are_refused(raw: Path, words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_damaged_history_fails_its_climate(raw: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["make-climate", "--raw", str(raw), "--planets", "TOI-700 d", "--co2", "0.01"]
    folder = raw / "climate-work/toi700d_g0_pCO2_0.01bar"
    folder.mkdir(parents=True)
    with pytest.raises(data.DataError, match="holds no run of make-climate"):
        plot.describe_runs(raw / "climate-work", raw / "x.png")
    for text in ("[{]", '[{"toa": 1}]', "7"):
        (folder / "history.json").write_text(text)
        assert main(command) == 1
        assert "history.json: is no list of segments" in capsys.readouterr().out
        with pytest.raises(data.DataError, match="is no list of segments"):
            plot.describe_runs(raw / "climate-work", raw / "x.png")
    (folder / "history.json").write_text('[{"toa_imbalance": 1.0, "ts_mean": 280.0}]')
    (folder / "job.json").write_text("{}")
    with pytest.raises(data.DataError, match=r"job.json \[steps, timestep\]"):
        plot.describe_runs(raw / "climate-work", raw / "x.png")
    assert not (raw / "x.png").exists()
    assert calls(raw) == []


def test_an_error_page_is_no_catalogue(raw: Path, capsys: pytest.CaptureFixture) -> None:
    page = raw / "page.csv"
    page.write_text("<html>\n<h1>504 Gateway Time-out</h1>\n")
    assert main(["make-climate", "--raw", str(raw), "--planets", "x", "--catalogue", str(page)]) == 2
    assert "page.csv [header]: is not the planet catalogue" in capsys.readouterr().err


@pytest.mark.skipif("ASTROBIOGEN_RAW" not in os.environ, reason="ASTROBIOGEN_RAW does not name a folder of raw files")
def test_the_rule_gives_the_parameters_of_the_bundled_climates() -> None:
    folder = Path(os.environ["ASTROBIOGEN_RAW"])
    catalogue = folder / "tables/oec_planets.csv.gz"
    with gzip.open(catalogue, "rt") as handle:
        rows = {row["name"]: row for row in csv.DictReader(handle)}
    for name, prefix in (("TOI-700 d", "toi700d"), ("Kepler-442 b", "kepler442b"), ("LHS 1140 b", "lhs1140b"),
                         ("LP 890-9 c", "lp8909c")):  # fmt: skip
        with xr.open_dataset(folder / f"climate/{prefix}_g1_pCO2_0.01bar_seg1.nc", decode_times=False) as dataset:
            expected = json.loads(dataset.attrs["parameters"])
        found = climate_of(catalogue, rows[name], 1, 0.01).parameters
        for key in ("startemp", "flux", "radius", "gravity", "rotationperiod", "pCO2"):
            assert found[key] == pytest.approx(expected[key], rel=5e-3), (name, key)
