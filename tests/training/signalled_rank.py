"""Run by `test_ending.py` in each process under torchrun: train, and signal one of the processes after two batches.

torchrun ... tests/training/signalled_rank.py RANK SIGNAL OPTION...
"""

import os
import signal
import sys
from typing import Any

from astrobiogen import train
from astrobiogen.training import blocks


def main() -> int:
    """The exit status of the training command."""
    rank, name, *options = sys.argv[1:]
    inner, calls = blocks.collate_shared, 0

    def collate(samples: Any, pad_id: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.Signals[name])
        return inner(samples, pad_id)

    blocks.collate_shared = collate
    return train.main(options)


if __name__ == "__main__":
    sys.exit(main())
