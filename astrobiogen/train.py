"""`python -m astrobiogen.train`: trains the model and reports what it has learnt.

Without options: the tiny preset on the bundled data, on the CPU, in a few minutes. `--help` lists every option. On
several GPUs or processes: `python -m torch.distributed.run --nproc-per-node N -m astrobiogen.train ...`.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from astrobiogen.system import console
from astrobiogen.system.extras import Later
from astrobiogen.training.config import HangConfig, TrainConfig, claim, command_line, requeue, run_folder
from astrobiogen.training.config.claim import Claim
from astrobiogen.training.launch import launched_rank, spoken_once
from astrobiogen.training.observe import failure
from astrobiogen.training.observe.watchdog import NOTHING_LOST, Watchdog, limits_of

# What trains and what plans is loaded when the command line is understood, so that `--help` answers at once.
distributed = Later("astrobiogen.training.distributed")
ending = Later("astrobiogen.training.distributed.ending")
assemble = Later("astrobiogen.training.batches.assemble")
room = Later("astrobiogen.training.tools.room")
run = Later("astrobiogen.training.run")
runtime = Later("astrobiogen.training.distributed.runtime")
trackers = Later("astrobiogen.training.observe.trackers")


@dataclasses.dataclass
class _Place:
    """The run folder once there is one: where failures are written down."""

    folder: Path | None = None


def _run(arguments: Sequence[str], place: _Place) -> int:
    with _setup(HangConfig()), spoken_once():
        options = command_line.parse(arguments)
    if options.plan:
        return room.show(options.config, options.memory, options.processes) if launched_rank() == 0 else 0
    if options.find_lr:
        return _find_learning_rate(options, place) if launched_rank() == 0 else 0
    with _setup(options.config.hang):
        trackers.require(options.config.monitor)
    cuda = runtime.choose_device(options.config.runtime.device).type == "cuda"
    with (
        distributed.World.join(options.config.distributed.timeout_minutes, cuda) as world,
        contextlib.ExitStack() as stack,
    ):
        with _setup(options.config.hang):
            bundle = None if options.resume else _fitting(options, world)
            owned, config = world.on_main(lambda: stack.enter_context(_folder(options)))
        place.folder = owned.folder
        if owned.state == claim.DONE and options.resume == requeue.AUTO:
            if world.main:
                sys.stdout.write(ending.said_before(owned.folder) + "\n")
            return 0
        ended = run.train(config, owned.folder, owned.state != claim.NEW, world, bundle)
    return ending.status(config.runtime.preempted_status, os.environ) if ended == run.PREEMPTED else 0


def _fitting(options: command_line.Options, world: Any) -> Any:
    """The data of a new run whose plan fits, loaded before it has a folder."""
    loaded: list[Any] = []

    def load() -> None:
        loaded.append(assemble.load_bundle(options.config))
        if not options.force:
            room.require(options.config, loaded[0], runtime.choose_device(options.config.runtime.device), world.size)

    world.together(load)
    return loaded[0]


def _find_learning_rate(options: command_line.Options, place: _Place) -> int:
    with contextlib.ExitStack() as stack:
        with _setup(options.config.hang):
            owned = stack.enter_context(claim.claimed(options.output, options.config.preset))
        place.folder = owned.folder
        return run.find_learning_rate(options.config, owned.folder)


@contextlib.contextmanager
def _setup(limits: HangConfig) -> Iterator[None]:
    """What comes before there is a run folder, which may hang as well: on a file system that does not answer."""
    with Watchdog(None, limits_of(limits), advice=NOTHING_LOST) as watchdog, watchdog.section("setup"):
        yield


@contextlib.contextmanager
def _folder(options: command_line.Options) -> Iterator[tuple[Claim, TrainConfig]]:
    """The run folder, made or found, for this process alone, and the configuration to train with in it."""
    if options.resume == requeue.AUTO:
        with claim.claimed(options.output, options.config.preset, go_on=True) as owned:
            config = options.config if owned.state == claim.NEW else requeue.agreed(options.config, owned.folder)
            yield owned, config
    elif options.resume:
        with claim.resumed(run_folder.find(options.resume)) as owned:
            yield owned, options.config
    else:
        with claim.claimed(options.output, options.config.preset) as owned:
            yield owned, options.config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong, 3 something hung,
    `runtime.preempted_status` (75) stopped by a signal and to be gone on with.
    """
    given = sys.argv[1:] if arguments is None else arguments
    place = _Place()
    with console.best_effort():
        return failure.guarded(lambda: _run(given, place), lambda: place.folder)


if __name__ == "__main__":
    sys.exit(main())
