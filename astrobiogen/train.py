"""`python -m astrobiogen.train`: trains the model and reports what it has learnt.

Without options: the tiny preset on the bundled data, on the CPU, in a few minutes. `--help` lists every option. On
several GPUs or processes: `python -m torch.distributed.run --nproc-per-node N -m astrobiogen.train ...`.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from astrobiogen.training import cli, plan, run_folder, runtime, session
from astrobiogen.training.distributed import World, launched_rank
from astrobiogen.training.errors import UserError


@dataclasses.dataclass
class _Place:
    """Where a crash would be written: the run folder once there is one."""

    folder: Path = dataclasses.field(default_factory=lambda: Path(tempfile.gettempdir()))


def _run(arguments: Sequence[str], place: _Place) -> int:
    with cli.spoken_once():
        options = cli.parse(arguments)
    if options.plan:
        return plan.show(options.config, options.memory) if launched_rank() == 0 else 0
    if options.find_lr:
        return _find_learning_rate(options, place) if launched_rank() == 0 else 0
    cuda = runtime.choose_device(options.config.runtime.device).type == "cuda"
    with World.join(options.config.distributed.timeout_minutes, cuda) as world:
        place.folder = world.on_main(lambda: _folder(options))
        try:
            return session.train(options.config, place.folder, bool(options.resume), world)
        except UserError:
            if world.main and not options.resume:
                run_folder.discard_unbegun(place.folder)
            raise


def _find_learning_rate(options: cli.Options, place: _Place) -> int:
    place.folder = _folder(options)
    return session.find_learning_rate(options.config, place.folder)


def _folder(options: cli.Options) -> Path:
    """The run folder, made or found."""
    if options.resume:
        return run_folder.find(options.resume)
    return run_folder.create(options.output, options.config.preset)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done (or stopped by a signal, with a checkpoint), 1 failed, 2 wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    place = _Place()
    return cli.guarded(lambda: _run(given, place), lambda: place.folder / "crash.log")


if __name__ == "__main__":
    sys.exit(main())
