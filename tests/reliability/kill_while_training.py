"""Kill a training process with SIGKILL again and again, many times inside a save, and show that nothing is ever lost.

    python -m tests.reliability.kill_while_training --kills 200 [--asynchronous]

One parent, which has imported everything, forks a child that trains (or resumes) a small model and saves after every
micro-batch. Every second child is killed by the parent after a random time; the others kill themselves at a random
stage of a save. After each kill the newest whole checkpoint is looked for, and the steps that log.jsonl knows beyond it
are what was lost. In the end the run goes on for an epoch or two without a kill, and its weights and its loss log are
compared with those of a run that was never killed. Prints JSON; exit code 1 on any loss.
"""

import argparse
import collections
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from astrobiogen.training.checkpoint import CheckpointStore
from astrobiogen.training.config import CheckpointConfig, ScheduleConfig, StopConfig
from astrobiogen.training.context import Run
from astrobiogen.training.distributed import runtime
from astrobiogen.training.errors import CheckpointError
from astrobiogen.training.observe.monitor import Monitor, read_log
from astrobiogen.training.trainer import Trainer
from tests.training import conftest as toy

EPOCHS = 100_000  # never reached; the same for all, since a run that goes on may not change them
BATCHES_PER_EPOCH = 6
RESUMED = "resumed"
MOST_STAGES = 40  # stages of about four saves


def trained(
    folder: Path, asynchronous: bool, *, last: int | None = None, observer: Callable[[str], None] | None = None
) -> Trainer:
    """Train or resume in `folder`, saving after every micro-batch; a signal comes while micro-batch `last` is run."""
    config = toy.toy_config(
        epochs=EPOCHS,
        checkpoint=CheckpointConfig(every_minutes=1e-9, asynchronous=asynchronous),
        schedule=ScheduleConfig(name="constant"),
        stop=StopConfig(patience=0, target_accuracy=1.0),
    )
    folder.mkdir(exist_ok=True)
    with Monitor(folder, config.monitor) as monitor:
        run = Run(config, torch.device("cpu"), torch.float32, folder, monitor)
        interrupt = runtime.Interrupt()
        trainer = Trainer(toy.toy_task(config), run, interrupt, observer=observer)
        trainer.saver.resume()

        def signalled(model: nn.Module, _inputs: object, _output: object) -> None:
            if model.training and trainer.progress.step + 1 == last:
                interrupt.received = "SIGTERM"

        trainer.model.register_forward_hook(signalled)
        if observer is not None:
            observer(RESUMED)
        trainer.fit()
    return trainer


def one_kill(folder: Path, stages: int, seconds: float, asynchronous: bool) -> str:
    """Fork a child that trains, and have it killed: by itself after `stages` stages of saving, or, if that is 0, by us
    `seconds` after it began to train. Returns the stage that it had reached.
    """
    board = mmap.mmap(-1, 64)
    process = os.fork()
    if process == 0:
        try:
            seen = 0

            def observer(stage: str) -> None:
                nonlocal seen
                seen += 1
                board[:64] = stage.encode().ljust(64)
                if seen == stages:
                    os.kill(os.getpid(), signal.SIGKILL)

            trained(folder, asynchronous, observer=observer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)  # a child that ends by itself is a failure of this script
    if not stages:
        end = time.monotonic() + 60
        while board[0] == 0 and time.monotonic() < end:  # until it trains: a kill while it imports would prove little
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"the child ended with status {status}, expected SIGKILL")
    return board[:64].decode().strip("\0 ")


def newest_step(folder: Path) -> int:
    """Step of the newest whole checkpoint; 0 for none yet."""
    found = CheckpointStore(folder / "checkpoints", keep=3).load_newest()
    return 0 if found is None else int(found[1].documents["training"]["progress"]["step"])


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every update as if nothing had happened."""
    records = read_log(folder / "log.jsonl")
    return [(record["step"], record["loss"]) for record in records if record["event"] == "step"]


def experiment(base: Path, kills: int, generator: random.Random, asynchronous: bool = False) -> dict[str, object]:
    """The figures of one experiment."""
    folder = base / "killed"
    unreadable, half_written, lost, steps = 0, 0, 0, [0]
    stages: collections.Counter[str] = collections.Counter()
    for number in range(kills):
        inside = generator.randrange(1, MOST_STAGES) if number % 2 == 0 else 0
        stages[one_kill(folder, inside, generator.uniform(0.0, 0.3), asynchronous)] += 1
        saved = folder / "checkpoints"
        half_written += any(".tmp-" in path.name or path.name.startswith("deleting-") for path in saved.glob("*"))
        try:
            step = newest_step(folder)
        except CheckpointError as error:
            sys.stderr.write(f"kill {number}: {error}\n")
            unreadable += 1
            continue
        done = max((step for step, _ in losses(folder)), default=0) if (folder / "log.jsonl").exists() else 0
        lost = max(lost, steps[-1] - step, done - step)
        steps.append(step)
    last = (steps[-1] // BATCHES_PER_EPOCH + 2) * BATCHES_PER_EPOCH
    resumed = trained(folder, asynchronous, last=last)
    whole = trained(base / "whole", asynchronous=False, last=last)
    if not resumed.progress.step == whole.progress.step == last:
        raise SystemExit(f"stopped at steps {resumed.progress.step} and {whole.progress.step}, expected {last}")
    expected = whole.model.state_dict()
    return {
        "kills": kills,
        "half_written_saves_found": half_written,
        "unrecoverable": unreadable,
        "most_micro_batches_lost": lost,
        "last_step": steps[-1],
        "weights_equal_to_never_killed": all(
            torch.equal(value, expected[key]) for key, value in resumed.model.state_dict().items()
        ),
        "loss_log_equal_to_never_killed": losses(folder) == losses(base / "whole"),
        "last_stage_before_the_kill": dict(stages.most_common()),
    }


def main() -> int:
    """Run the experiment; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true", help="save in the background")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result = experiment(Path(name), arguments.kills, random.Random(arguments.seed), arguments.asynchronous)
    sys.stdout.write(json.dumps(result | {"seconds": round(time.monotonic() - started)}) + "\n")
    good = result["weights_equal_to_never_killed"] and result["loss_log_equal_to_never_killed"]
    # In the background the save of one micro-batch is written while the next one runs.
    most = 2 if arguments.asynchronous else 1
    return 0 if good and not result["unrecoverable"] and int(str(result["most_micro_batches_lost"])) <= most else 1


if __name__ == "__main__":
    sys.exit(main())
