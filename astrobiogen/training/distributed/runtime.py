"""The process: seeds, determinism, threads, memory allocator, signals."""

import ctypes
import dataclasses
import os
import platform
import random
import signal
import time
import types
from typing import Any

import numpy
import torch

from astrobiogen.training.config import RuntimeConfig
from astrobiogen.training.errors import UserError

# glibc's malloc.h. Without these settings each block above 128 KiB (later up to 32 MiB, as the limit adapts) is mapped
# and unmapped with the kernel, and page faults dominate memory-bound steps.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CPU and every GPU)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every generator, as tensors, numbers, strings and tuples of these only (no pickle needed to store
    it).
    """
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            name,
            torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = tuple(torch.cuda.get_rng_state_all())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(state["cuda"]))


def keep_freed_pages() -> bool:
    """Tell glibc to keep freed memory in the process instead of returning it to the kernel at once; False where there
    is no glibc.

    The price: the resident size does not shrink below its peak until the process ends.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    no_mapping = libc.mallopt(ctypes.c_int(_M_MMAP_MAX), ctypes.c_int(0))
    no_trimming = libc.mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(-1))
    return bool(no_mapping and no_trimming)


def choose_device(name: str, number: int | None = None) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; of several GPUs the one with this number, by default the current one.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: got 'cuda', but PyTorch finds no CUDA device here; use --runtime.device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number is not None and number >= torch.cuda.device_count():
        raise UserError(
            f"process {number} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
            "start fewer processes (--nproc-per-node) or use --runtime.device cpu"
        )
    return torch.device("cuda") if number is None else torch.device("cuda", number)


def prepare(config: RuntimeConfig, seed: int) -> dict[str, Any]:
    """Apply threads, determinism, allocator policy and seeds; returns what was done, for environment.json."""
    kept = config.malloc == "keep_pages" and keep_freed_pages()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(config.deterministic)
    # Filling fresh memory with NaN is a debugging aid of the deterministic mode; it costs a pass over each new tensor.
    filling = "fill_uninitialized_memory"  # a property of the module object, which type checkers do not know
    setattr(torch.utils.deterministic, filling, False)
    seed_everything(seed)
    return {
        "threads": torch.get_num_threads(),
        "deterministic": config.deterministic,
        "malloc": "keep_pages" if kept else "system",
        "seed": seed,
    }


# What ends a run with a checkpoint: a person, a batch system's end and its warnings before it, a closed terminal, the
# limit of processor time.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# A second one of these ends the process at once. The others come several times, or before a SIGTERM, by themselves.
_INSISTING = (signal.SIGINT, signal.SIGTERM)
# Under torchrun its agent passes on what it gets: a batch system that signals every process is heard twice.
_COPY_SECONDS = 5.0


@dataclasses.dataclass
class Interrupt:
    """Turns every signal of `STOPPING` into a flag that the loop polls; the second SIGINT or SIGTERM ends the process
    at once (under torchrun one 5 s later: its agent sends a copy of the first). SIGHUP stays ignored where it was
    (`nohup`).

    Use as a context manager.

    Attributes:
        received: name of the first signal; empty without one.
        saved: whether a checkpoint was saved because of it.
    """

    received: str = ""
    saved: bool = False
    _insisted: float | None = None
    _copied: bool = dataclasses.field(default_factory=lambda: "TORCHELASTIC_RUN_ID" in os.environ)
    _previous: dict[int, Any] = dataclasses.field(default_factory=dict)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if number in _INSISTING:
            now = time.monotonic()
            if self._insisted is None:
                self._insisted = now
            elif not self._copied or now - self._insisted > _COPY_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        self.received = self.received or signal.Signals(number).name

    def __enter__(self) -> "Interrupt":
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
