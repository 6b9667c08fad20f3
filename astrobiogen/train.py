"""`python -m astrobiogen.train`: trains the model and reports what it has learnt.

Without options: the tiny preset on the bundled data, on the CPU, in a few minutes. `--help` lists every option.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from astrobiogen.training import cli, plan, run_folder, session


@dataclasses.dataclass
class _Place:
    """Where a crash would be written: the run folder once there is one."""

    folder: Path = dataclasses.field(default_factory=lambda: Path(tempfile.gettempdir()))


def _run(arguments: Sequence[str], place: _Place) -> int:
    options = cli.parse(arguments)
    if options.plan:
        return plan.show(options.config, options.memory)
    if options.resume:
        place.folder = run_folder.find(options.resume)
    else:
        place.folder = run_folder.create(options.output, options.config.preset)
    if options.find_lr:
        return session.find_learning_rate(options.config, place.folder)
    return session.train(options.config, place.folder, bool(options.resume))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done (or stopped by a signal, with a checkpoint), 1 failed, 2 wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    place = _Place()
    return cli.guarded(lambda: _run(given, place), lambda: place.folder / "crash.log")


if __name__ == "__main__":
    sys.exit(main())
