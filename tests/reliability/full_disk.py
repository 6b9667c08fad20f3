"""Let the disk fill up while training saves, free it again, and show that nothing saved is lost and the run goes on.

    python -m tests.reliability.full_disk                       # files may not grow beyond 3,000 bytes for a while
    python -m tests.reliability.full_disk --folder /mnt/small   # a small file system that a file fills for a while

Every failure is a real one of the operating system, at whatever byte it comes. While the disk is full, each save must
fail with a message and leave the newest checkpoint from before whole; afterwards saving must work again; the weights in
the end must equal those of a run on a large disk. Prints JSON; exit code 1 otherwise.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from astrobiogen.training.checkpoint import CheckpointStore, Content
from astrobiogen.training.config import CheckpointConfig
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import runtime
from astrobiogen.training.observe.monitor import Monitor, read_log
from astrobiogen.training.trainer import Trainer
from tests.training import conftest as toy

FULL_FROM, FULL_UNTIL = 7, 13  # micro-batches of 18
LEFT_FREE = 8192


def trained(folder: Path, at_step: Callable[[Trainer, int], None]) -> Trainer:
    """Train in `folder`, saving after every micro-batch; `at_step` is called before each save."""
    config = toy.toy_config(checkpoint=CheckpointConfig(every_minutes=1e-9))
    folder.mkdir()
    with Monitor(folder, config.monitor) as monitor:
        run = Run(config, torch.device("cpu"), torch.float32, folder, monitor)
        trainer = Trainer(toy.toy_task(config), run, runtime.Interrupt())
        save = trainer.saver.save

        def watched(why: str) -> bool:
            at_step(trainer, trainer.progress.step)
            return save(why)

        trainer.saver.save = watched  # type: ignore[method-assign]
        if not trainer.fit():
            raise SystemExit("the run was interrupted")
    return trainer


def _step(found: tuple[Path, Content] | None) -> str:
    """Name of a checkpoint without the number of its repetition; two may be saved at one step."""
    return found[0].name.split("-r")[0] if found else "nothing"


def experiment(folder: Path, fill: Callable[[], None], free: Callable[[], None]) -> dict[str, object]:
    """The figures of one experiment; `fill` and `free` make the disk full and roomy again."""
    newest: list[str] = []

    def at_step(trainer: Trainer, step: int) -> None:
        if step == FULL_FROM:
            fill()
        found = CheckpointStore(trainer.saver.store.root, 3).load_newest() if step > 1 else None
        if FULL_FROM < step <= FULL_UNTIL:
            newest.append(_step(found))
        if step == FULL_UNTIL:
            free()

    try:
        squeezed = trained(folder / "run", at_step)
    finally:
        free()
    with tempfile.TemporaryDirectory() as name:
        whole = trained(Path(name) / "run", lambda _trainer, _step: None)
    expected = whole.model.state_dict()
    records = read_log(folder / "run" / "log.jsonl")
    found = squeezed.saver.store.load_newest()
    return {
        "newest_whole_while_full": sorted(set(newest)),
        "records_lost": sum(record["lost"] for record in records if record["event"] == "log_gap"),
        "newest_in_the_end": _step(found),
        "left_over": sorted(path.name for path in squeezed.saver.store.root.iterdir() if ".tmp-" in path.name),
        "weights_equal": all(torch.equal(value, expected[key]) for key, value in squeezed.model.state_dict().items()),
    }


def main() -> int:
    """Run the experiment; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="", help="a folder on a small file system")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder:
        base = Path(options.folder) / "experiment"
        filler = Path(options.folder) / "filler"

        def fill() -> None:
            filler.write_bytes(b"x" * max(shutil.disk_usage(options.folder).free - LEFT_FREE, 0))

        def free() -> None:
            filler.unlink(missing_ok=True)
    else:
        base = Path(tempfile.mkdtemp())
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most))

        def free() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    base.mkdir(exist_ok=True)
    try:
        result = experiment(base, fill, free)
    finally:
        shutil.rmtree(base)
    sys.stdout.write(json.dumps(result) + "\n")
    kept = result["newest_whole_while_full"] == [f"step-{FULL_FROM - 1:08d}"]
    good = (
        kept and result["weights_equal"] and result["newest_in_the_end"] == "step-00000018" and not result["left_over"]
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
