"""``python -m astrobiogen.data build|check|describe``."""

from __future__ import annotations

import importlib
import sys

from astrobiogen.data.errors import DataError

# Subcommand -> module with ``main(arguments) -> exit status``. Only the chosen one is loaded: ``build`` needs packages
# that loading does not.
COMMANDS = {
    "build": "astrobiogen.data.builders.run",
    "check": "astrobiogen.data.check",
    "describe": "astrobiogen.data.describe",
}
OPTIONAL_PACKAGES = ("xarray", "netCDF4", "libsbml", "scipy", "matplotlib")
USAGE = "usage: python -m astrobiogen.data build|check|describe [options]; --help after a command lists its options\n"


def main(arguments: list[str]) -> int:
    """Run a subcommand; a data problem or a missing optional package is one line on standard error and status 2."""
    if not arguments or arguments[0] not in COMMANDS:
        sys.stderr.write(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        command = importlib.import_module(COMMANDS[arguments[0]])
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        sys.stderr.write(f"'{arguments[0]}' needs the package {error.name}: pip install 'astrobiogen[data]'\n")
        return 2
    try:
        return int(command.main(arguments[1:]))
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
