"""Damage a checkpoint in every way that one byte or one cut can, and show that each is noticed and the one before used.

    python -m tests.reliability.damage_checkpoints --flips 2000 --cuts 1000 --every-byte

A small run with averaged weights is stopped in the middle of an accumulation window, so that its newest checkpoint has
every file that a checkpoint can have. Random bits are then flipped in random files, and files are cut to random
lengths; after each damage the store must load the checkpoint before, with a warning that names the damage. With
`--every-byte` each byte of each file is changed once and must fail verification. Prints JSON; exit code 1 if a damage
went unnoticed.
"""

import argparse
import collections
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from astrobiogen.training.checkpoint import CheckpointStore, verify
from astrobiogen.training.config import CheckpointConfig
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.observe.monitor import Monitor
from astrobiogen.training.trainer import Trainer
from tests.training import conftest as toy

STOP_AFTER = 7  # micro-batches: inside the first window of the second epoch


class Warnings(logging.Handler):
    """Counts warnings of a fallback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self.count += "falling back to an older one" in record.getMessage()


def stopped_run(folder: Path) -> CheckpointStore:
    """The checkpoints of a run that was stopped inside a window."""
    config = toy.toy_config(checkpoint=CheckpointConfig(every_minutes=1e-9))
    interrupt, seen = runtime.Interrupt(), []
    task = toy.toy_task(config)

    def observer(stage: str) -> None:
        if stage == "before commit" and trainer.progress.step not in seen:
            seen.append(trainer.progress.step)
            if len(seen) == STOP_AFTER:
                interrupt.received = "SIGTERM"

    with Monitor(folder, config.monitor) as monitor:
        run = Run(config, torch.device("cpu"), torch.float32, folder, monitor)
        trainer = Trainer(task, run, interrupt, observer=observer)
        if trainer.fit():
            raise SystemExit("the run was not stopped")
    return trainer.saver.store


def noticed(store: CheckpointStore, expected: Path, warnings: Warnings) -> bool:
    """Whether loading warns and gives the checkpoint `expected`."""
    before = warnings.count
    found = CheckpointStore(store.root, store.keep).load_newest()
    return found is not None and found[0] == expected and warnings.count == before + 1


def experiment(folder: Path, flips: int, cuts: int, every_byte: bool, generator: random.Random) -> dict[str, object]:
    """The figures of one experiment."""
    store, warnings = stopped_run(folder), Warnings()
    logger = logging.getLogger("astrobiogen")
    logger.addHandler(warnings)
    logger.propagate = False
    newest, before = store.candidates()[:2]
    files = sorted(newest.iterdir())
    content = {path: path.read_bytes() for path in files}
    unnoticed: list[str] = []
    damages: collections.Counter[str] = collections.Counter()

    def damage(path: Path, data: bytes, name: str) -> None:
        path.write_bytes(data)
        damages[path.name] += 1
        if not noticed(store, before, warnings):
            unnoticed.append(name)
        path.write_bytes(content[path])

    for _ in range(flips):
        path = generator.choice(files)
        data, place = bytearray(content[path]), generator.randrange(len(content[path]))
        data[place] ^= 1 << generator.randrange(8)
        damage(path, bytes(data), f"{path.name}: bit of byte {place}")
    for _ in range(cuts):
        path = generator.choice(files)
        length = generator.randrange(len(content[path]))
        damage(path, content[path][:length], f"{path.name}: cut to {length}")
    checked = 0
    for path in files if every_byte else ():
        for place in range(len(content[path])):
            data = bytearray(content[path])
            data[place] ^= 1 << (place % 8)
            path.write_bytes(bytes(data))
            checked += 1
            try:
                verify(newest)
                unnoticed.append(f"{path.name}: byte {place}")
            except CheckpointError:
                continue
        path.write_bytes(content[path])
    logger.removeHandler(warnings)
    logger.propagate = True
    verify(newest)  # whole again: what was noticed was the damage
    return {
        "files": {path.name: len(data) for path, data in content.items()},
        "flips": flips,
        "cuts": cuts,
        "every_byte_changed_once": checked,
        "damages_per_file": dict(damages),
        "unnoticed": unnoticed,
    }


def main() -> int:
    """Run the experiment; 0 if every damage was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--every-byte", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result = experiment(Path(name), options.flips, options.cuts, options.every_byte, random.Random(options.seed))
    sys.stdout.write(json.dumps(result | {"seconds": round(time.monotonic() - started)}) + "\n")
    return 1 if result["unnoticed"] else 0


if __name__ == "__main__":
    sys.exit(main())
