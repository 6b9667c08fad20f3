"""The script that runs one segment of one climate in the interpreter that has ExoPlaSim."""

SCRIPT = '''\
"""One segment of a climate. Reads job.json, leaves segment-K.nc and restart-(K+1); K is the argument."""
import json
import os
import shutil
import sys
from pathlib import Path

import exoplasim

here = Path(__file__).resolve().parent
job = json.loads((here / "job.json").read_text())
number = int(sys.argv[1])
work = here / "work"
shutil.rmtree(work, ignore_errors=True)  # what an interrupted attempt left
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
for source, target in ((outputs[-1], f"segment-{number}.nc"), (work / "plasim_restart", f"restart-{number + 1}")):
    shutil.copyfile(source, here / "part")
    os.replace(here / "part", here / target)
shutil.rmtree(work, ignore_errors=True)
'''
