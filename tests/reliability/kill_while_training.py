"""Kill a training process with SIGKILL again and again, many times inside a save, and show that nothing is ever lost.

    python tests/reliability/kill_while_training.py --kills 200

One parent forks a child that trains (or resumes) a small model, saving after every window; the parent kills it after a
random time, or the child kills itself at a random stage of a save. After each kill the newest whole checkpoint is
looked for; in the end the run is finished without a kill and its weights are compared, bit by bit, with those of a run
that was never killed. Prints a table; exit code 1 on any loss.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from astrobiogen.training import runtime
from astrobiogen.training.checkpoint import CheckpointStore
from astrobiogen.training.config import CheckpointConfig, ScheduleConfig, StopConfig
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.monitor import Monitor
from astrobiogen.training.trainer import Trainer

_spec = importlib.util.spec_from_file_location("toy", Path(__file__).parents[1] / "training" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
toy = importlib.util.module_from_spec(_spec)
sys.modules["toy"] = toy
_spec.loader.exec_module(toy)

EPOCHS = 100_000  # never reached by the killed children
STAGES_PER_SAVE = 9


def trained(folder: Path, epochs: int, observer: Callable[[str], None] | None) -> Trainer:
    """Train or resume in `folder`, saving as often as the loop allows."""
    config = toy.toy_config(epochs=epochs, checkpoint=CheckpointConfig(every_minutes=1e-9))
    config = toy.dataclasses.replace(
        config, schedule=ScheduleConfig(name="constant"), stop=StopConfig(patience=0, target_accuracy=1.0)
    )
    folder.mkdir(exist_ok=True)
    with Monitor(folder, config.monitor) as monitor:
        trainer = Trainer(
            toy.toy_task(config),
            config,
            folder,
            monitor,
            runtime.Interrupt(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            observer=observer,
        )
        trainer.saver.resume()
        trainer.fit()
    return trainer


def child(folder: Path, generator: random.Random, inside: bool) -> None:
    """Train until killed; with `inside`, by itself at a random stage of one of the next saves."""
    remaining = generator.randrange(1, 4 * STAGES_PER_SAVE)

    def observer(_stage: str) -> None:
        nonlocal remaining
        remaining -= 1
        if inside and remaining <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(folder, EPOCHS, observer)


def one_kill(folder: Path, generator: random.Random, inside: bool) -> None:
    """Fork a child and have it killed."""
    process = os.fork()
    if process == 0:
        try:
            child(folder, generator, inside)
        finally:
            os._exit(3)  # a child that ends by itself is a failure of this script
    if not inside:
        time.sleep(generator.uniform(0.02, 0.5))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"the child ended with status {status}, expected SIGKILL")


def newest_step(folder: Path) -> int:
    """Step of the newest whole checkpoint; -1 for none yet."""
    found = CheckpointStore(folder / "checkpoints", keep=3).load_newest()
    return -1 if found is None else int(found[1].documents["training"]["progress"]["step"])


def main() -> int:
    """Run the experiment; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, lost, torn, steps = Path(name) / "killed", 0, 0, [-1]
        for number in range(arguments.kills):
            inside = number % 2 == 0
            one_kill(folder, generator, inside)
            torn += any(
                ".tmp-" in path.name or path.name.startswith("deleting-") for path in (folder / "checkpoints").glob("*")
            )
            try:
                step = newest_step(folder)
            except CheckpointError as error:
                sys.stderr.write(f"kill {number}: {error}\n")
                lost += 1
                continue
            lost += step < steps[-1]
            steps.append(step)
        epochs = max(steps[-1], 0) // 6 + 2
        resumed, whole = trained(folder, epochs, None), trained(Path(name) / "whole", epochs, None)
        expected = whole.model.state_dict()
        equal = all(torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items())
    result = {
        "kills": arguments.kills,
        "half_written_saves_found": torn,
        "lost_or_unreadable": lost,
        "last_step": steps[-1],
        "equal_to_never_killed": equal,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if equal and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
