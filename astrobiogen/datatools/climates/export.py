"""``python -m astrobiogen.data export [PACK] --output FILE``: climates of a pack as one Zarr store or netCDF file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from astrobiogen.data.load import SAMPLE_FOLDER
from astrobiogen.data.storage.pack import open_pack
from astrobiogen.datatools.climates.store import ClimateStore, export_pack


def main(arguments: list[str]) -> int:
    """Command line of ``export``."""
    parser = argparse.ArgumentParser(
        prog="python -m astrobiogen.data export",
        description="Write the climates of a packed dataset in physical units (K, kg kg-1, 1), one chunk per planet, "
        "epoch, segment and variable. xarray.open_zarr(FILE, consolidated=False) reads it.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=SAMPLE_FOLDER, help="folder of the pack (default: the bundled one)"
    )
    parser.add_argument("--output", type=Path, required=True, help="new file, .zarr or .nc")
    options = parser.parse_args(arguments)
    export_pack(open_pack(options.folder), options.output)
    with ClimateStore(options.output) as store:
        sys.stdout.write(f"{options.output}: {len(store.climates)} climates\n")
    return 0
