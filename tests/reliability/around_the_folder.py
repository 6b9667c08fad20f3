"""Start runs at the same moment, kill them as their folder is born, and stop them by every signal.

    python -m tests.reliability.around_the_folder seeds --tries 8     # three seeds at once without --output, 8 times
    python -m tests.reliability.around_the_folder same --tries 8      # three seeds at once with one --output
    python -m tests.reliability.around_the_folder early --tries 30    # killed within 30 ms of the folder's birth
    python -m tests.reliability.around_the_folder signals             # every signal, then the same command to the end
    python -m tests.reliability.around_the_folder torchrun --tries 6  # every signal to one of two ranks

One parent, which has imported everything, forks the commands, which train on a small synthetic data set; `torchrun`
starts them afresh. Prints JSON; exit code 1 if a promise is broken.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from astrobiogen import data, train
from astrobiogen.training.batches import shared_items
from astrobiogen.training.config import RuntimeConfig
from astrobiogen.training.distributed import runtime

ROOT = Path(__file__).parents[2]
SHORT = (
    *("--smoke", "--data.limit=16", "--monitor.progress=plain", "--monitor.level=WARNING", "--runtime.threads=1"),
    *("--evaluation.bootstrap=0", "--evaluation.baselines=false", "--evaluation.ablation=false"),
)
PREEMPTED = RuntimeConfig().preempted_status


def started(options: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Fork a training command with what it prints in `log`; its process id."""
    process = os.fork()
    if process == 0:
        code = 99
        with contextlib.suppress(SystemExit):
            with log.open("ab") as file:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
            before()
            code = train.main([*SHORT, *options])
        os._exit(code)
    return process


def use_synthetic_data() -> None:
    """In place of the bundled data."""
    bundle = data.synthetic.make_bundle(16, 0)
    data.load_bundled = lambda: bundle


def status_of(process: int) -> int:
    """Its exit status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def figures(folder: Path) -> Any:
    """What says which weights were examined."""
    return json.loads((folder / "metrics.json").read_text())["model"]["all"]["loss"]["value"]


def alone(base: Path, seeds: range) -> dict[int, Any]:
    """The figures of each seed, trained alone."""
    result = {}
    for seed in seeds:
        assert status_of(started([f"--seed={seed}", f"--output={base / f'alone-{seed}'}"], base / "log")) == 0
        result[seed] = figures(base / f"alone-{seed}")
    return result


def seeds(base: Path, tries: int) -> tuple[dict[str, Any], bool]:
    """Three seeds at once: three folders, each with its own seed's figures."""
    expected, whole = alone(base, range(3)), 0
    for number in range(tries):
        place = base / str(number)
        place.mkdir()
        enter = functools.partial(os.chdir, place)
        processes = [started([f"--seed={seed}"], place / f"log-{seed}", enter) for seed in range(3)]
        statuses = [status_of(process) for process in processes]
        got = {json.loads((run / "metrics.json").read_text())["seed"]: figures(run) for run in place.glob("runs/*")}
        whole += statuses == [0, 0, 0] and got == expected
    return {"tries": tries, "three_whole_runs_of_their_own": whole}, whole == tries


def same(base: Path, tries: int) -> tuple[dict[str, Any], bool]:
    """Three seeds at once with one output: one trains to its own figures, two are refused by the owner's number."""
    expected, good = alone(base, range(3)), 0
    for number in range(tries):
        folder = base / f"run-{number}"
        logs = [base / f"log-{number}-{seed}" for seed in range(3)]
        processes = [started([f"--seed={seed}", f"--output={folder}"], logs[seed]) for seed in range(3)]
        statuses = [status_of(process) for process in processes]
        if sorted(statuses) != [0, 1, 1]:
            continue
        winner = statuses.index(0)
        named = [f"process {processes[winner]} on" in logs[seed].read_text() for seed in range(3) if seed != winner]
        result = json.loads((folder / "metrics.json").read_text())
        good += all(named) and (result["seed"], figures(folder)) == (winner, expected[winner])
    return {"tries": tries, "one_owner_and_two_refused_by_name": good}, good == tries


def early(base: Path, tries: int) -> tuple[dict[str, Any], bool]:
    """Killed within 30 ms of the folder's birth; the same command then begins, and is stopped when it trains."""
    generator = random.Random(0)
    before_configuration, again = 0, 0
    for number in range(tries):
        folder, log = base / f"run-{number}", base / "log"
        process = started([f"--output={folder}"], log)
        while not folder.exists():
            time.sleep(0.0005)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(process, signal.SIGKILL if number % 2 else signal.SIGTERM)
        status_of(process)
        configured = (folder / "config.yaml").exists()
        before_configuration += not configured
        options = [f"--output={folder}"] if not configured else [f"--output={folder}", "--resume=auto"]
        second = started(options, log, lambda: signal_at_batch(signal.SIGUSR1))
        again += status_of(second) == PREEMPTED
    result = {"tries": tries, "before_the_configuration": before_configuration, "the_same_command_trains": again}
    return result, again == tries


def signal_at_batch(number: int, rank: str | None = None) -> None:
    """Signal this process while its second batch is prepared."""
    inner, calls = shared_items.collate_shared, 0

    def collate(samples: Any, pad_id: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), number)
        return inner(samples, pad_id)

    shared_items.collate_shared = collate


def signals(base: Path, _tries: int) -> tuple[dict[str, Any], bool]:
    """Each signal: exit status, PREEMPTED, and the same command to the end with the figures of the whole run."""
    expected, result = alone(base, range(1))[0], {}
    for number in runtime.STOPPING:
        folder = base / number.name
        options = [f"--output={folder}", "--resume=auto"]
        first = status_of(started(options, base / "log", lambda number=number: signal_at_batch(number)))
        mark = json.loads((folder / "PREEMPTED").read_text())
        second = status_of(started(options, base / "log"))
        equal = second == 0 and figures(folder) == expected and not (folder / "PREEMPTED").exists()
        result[number.name] = {"status": first, "mark": mark, "same_figures": equal}
    good = all(
        (one["status"], one["mark"]["reason"], one["same_figures"]) == (PREEMPTED, name, True)
        for name, one in result.items()
    )
    return result, good


def torchrun(base: Path, tries: int) -> tuple[dict[str, Any], bool]:
    """The last `tries` signals, each to one of two ranks: the agent ends with 0, one step for both."""
    result: dict[str, Any] = {}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for place, number in enumerate(runtime.STOPPING[-tries:]):
        folder = base / number.name
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["rank", str(place % 2), number.name, *SHORT, f"--output={folder}", "--resume=auto"]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900, check=False)
        mark = json.loads((folder / "PREEMPTED").read_text()) if (folder / "PREEMPTED").exists() else {}
        names = [path.name for path in (folder / "checkpoints").glob("step-*")]
        said = (folder / "process-1" / "train.log").read_text()
        agreed = f"stopped by {number.name} at step {mark.get('step')};" in said
        whole = names == [f"step-{mark.get('step', 0):08d}"]
        result[number.name] = {"rank": place % 2, "status": done.returncode, "mark": mark, "one_step": agreed and whole}
    good = all(
        (one["status"], one["mark"].get("reason"), one["one_step"]) == (0, name, True) for name, one in result.items()
    )
    return result, good


def main() -> int:
    """Run one experiment; 0 if every promise held."""
    if sys.argv[1:2] == ["rank"]:
        rank, name, *options = sys.argv[2:]
        use_synthetic_data()
        signal_at_batch(signal.Signals[name], rank)
        return train.main(options)
    experiments = {work.__name__: work for work in (seeds, same, early, signals, torchrun)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--tries", type=int, default=8)
    options = parser.parse_args()
    use_synthetic_data()
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup training would rightly leave it ignored
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result, good = experiments[options.experiment](Path(name), options.tries)
    sys.stdout.write(json.dumps({options.experiment: result, "seconds": round(time.monotonic() - begun)}) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
