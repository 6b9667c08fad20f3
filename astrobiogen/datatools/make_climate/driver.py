"""The scripts that run in the interpreter that has ExoPlaSim: one makes it ready, one runs a segment of a climate."""

# Argument: a folder to work in. The first model of an installation compiles its Fortran; two at once would disturb
# each other. netCDF4 is not among the requirements of ExoPlaSim's package, but its netCDF output needs it.
PREPARE = """\
import importlib.metadata
import sys
from pathlib import Path

import exoplasim
import netCDF4

work = Path(sys.argv[1]) / "model"
model = exoplasim.Model(
    workdir=str(work), modelname="prepared", resolution="T21", layers=10, ncpus=1, precision=4, outputtype=".nc"
)
if not (work / model.executable).exists():
    sys.exit(f"{model.executable} was not built; are gfortran, g++ and make installed?")
print("\\n" + importlib.metadata.version("exoplasim"))
"""

SCRIPT = '''\
"""One segment of a climate. Reads job.json, leaves segment-K.nc and restart-(K+1); K is the argument."""
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
lock = (here / "lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit("another process runs this climate in this folder")

import exoplasim

job = json.loads((here / "job.json").read_text())
number = int(sys.argv[1])
work = here / "work"
for left in (work, here / (job["name"] + "_crashed")):  # by an interrupted or failed attempt
    shutil.rmtree(left, ignore_errors=True)
model = exoplasim.Model(
    workdir=str(work), modelname=job["name"], resolution="T21", layers=10, ncpus=1, precision=4, outputtype=".nc"
)
restart = here / f"restart-{number}"
model.configure(
    **job["parameters"],
    timestep=job["timestep"],
    runsteps=job["steps"],
    mldepth=job["mixed_layer"],
    snapshots=0,
    restartfile=str(restart) if restart.exists() else None,
)
model.run(years=1, crashifbroken=True, clean=True)
outputs = sorted(work.glob("MOST.*.nc"))
if not outputs or not (work / "plasim_restart").exists():
    sys.exit("ExoPlaSim left no output")
for source, target in ((work / "plasim_restart", f"restart-{number + 1}"), (outputs[-1], f"segment-{number}.nc")):
    shutil.copyfile(source, here / "part")
    os.replace(here / "part", here / target)
shutil.rmtree(work, ignore_errors=True)
'''
