"""The subcommands of `python -m astrobiogen.data`, and how each ends: one line, never a traceback."""

from __future__ import annotations

import importlib
import sys

from astrobiogen.data.errors import DataError
from astrobiogen.system import console

# Subcommand -> module with ``main(arguments) -> exit status``, and what it does. Only the chosen one is loaded:
# ``build`` needs packages that loading does not.
COMMANDS = {
    "build": ("builders.run", "raw files to a packed dataset"),
    "check": (
        "check",
        "verify a packed dataset; with --raw, recompute labels from the raw files",
    ),
    "describe": ("describe", "plots and tables of a packed dataset"),
    "export": (
        "climates.export",
        "climates of a packed dataset as Zarr or netCDF, in physical units",
    ),
    "fetch": ("fetch.run", "raw files from public sources (not verified online)"),
    "make-climate": (
        "make_climate.run",
        "run ExoPlaSim, an external program, for catalogue planets",
    ),
}
OPTIONAL_PACKAGES = ("xarray", "cf_xarray", "pint", "netCDF4", "zarr", "libsbml", "scipy", "matplotlib", "pandas")


def usage() -> str:
    """What ``--help`` shows."""
    lines = [f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return (
        "usage: python -m astrobiogen.data COMMAND [options]\n\nCommands:\n"
        + "\n".join(lines)
        + "\n\nCOMMAND --help lists its options. Exit status: 0 done, 1 problems found,\n"
        "2 wrong usage or no usable data, 130 interrupted.\n"
    )


def main(arguments: list[str]) -> int:
    """Run a subcommand; a data problem, a missing optional package, or a file or folder that the system refuses is one
    line on standard error and status 2.
    """
    with console.best_effort():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        found = f"error: unknown command {arguments[0]!r}\n\n" if arguments else ""
        sys.stderr.write(found + usage())
        return 2
    try:
        command = importlib.import_module(f"astrobiogen.datatools.{COMMANDS[arguments[0]][0]}")
        return int(command.main(arguments[1:]))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        sys.stderr.write(f"error: '{arguments[0]}' needs the package {error.name}: pip install 'astrobiogen[data]'\n")
        return 2
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
