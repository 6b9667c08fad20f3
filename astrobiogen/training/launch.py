"""Whether torchrun has started this process, and as which: from its variables, before torch.distributed is loaded."""

import contextlib
import os
from collections.abc import Iterator

from astrobiogen.training.errors import UserError

# What torchrun sets, and a process that is to run by itself must not see.
VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)  # fmt: skip


def launched() -> bool:
    """Whether torchrun (or anything that sets its variables) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """Number of this process among those that torchrun has started; 0 without torchrun."""
    return int(os.environ["RANK"]) if launched() else 0


@contextlib.contextmanager
def spoken_once() -> Iterator[None]:
    """Let only the first process of a run print: all read the same command line and would say the same."""
    if launched_rank() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            yield
        except UserError as error:
            raise SystemExit(error.exit_code) from error
