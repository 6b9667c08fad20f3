"""Runs mutated calls in a process that may die of them, and says what came of each."""

import ctypes
import os
import random
import resource
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astrobiogen.kernels import registry
from astrobiogen.testing.fuzzing.calls import Call
from astrobiogen.testing.fuzzing.memory import Arena
from astrobiogen.testing.fuzzing.mutations import Mutant, mutate

# Memory that a call may ask for beyond what the process has: more is an error of the call, not of the machine.
MEMORY = 1 << 30
MOST_TRIES = 20
# Relative to the largest element of the result. Wrong in kind, not in rounding: that is the battery's question.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# A backward op that is given results of the forward besides its inputs: once one of them is changed they contradict
# each other, and what is right is not defined.
RESULTS = {"out", "lse", "rstd", "mean", "gates"}
MOST_COMPARED = 10_000_000
FILL_BYTE = 0xA5
M_PERTURB = -6

REFUSED, ACCEPTED, WRONG = "refused", "accepted", "wrong"


def prepare(calls: Sequence[Call], seed: int, index: int) -> tuple[Call, Mutant, random.Random]:
    """Call `index` of the series `seed`: which valid call, and what became of it. Operators come equally often."""
    draw = random.Random(f"{seed}/{index}")
    for _ in range(MOST_TRIES):
        op = draw.choice(sorted({call.op for call in calls}))
        call = draw.choice([one for one in calls if one.op == op])
        mutant = mutate(call.arguments, draw)
        if not any("impossible" in change for change in mutant.changes):
            break
    return call, mutant, draw


def place(arguments: Sequence[Any], arena: Arena | None, draw: random.Random) -> list[Any]:
    """The arguments with their tensors between forbidden pages."""
    if arena is None:
        return list(arguments)
    arena.clear()
    at_end = draw.random() < 0.7

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return arena.place(value, at_end) if isinstance(value, torch.Tensor) else value

    return [moved(value) for value in arguments]


def attempt(call: Call, arguments: Sequence[Any]) -> tuple[Any, str]:
    """(result, "") of one call, or (None, why it was refused)."""
    try:
        return call.overload(*arguments, **call.keywords), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def compare(call: Call, mutant: Mutant, arguments: Sequence[Any], got: Any) -> str:
    """What is wrong with the result of an accepted call, in words; empty where the reference agrees, or refuses."""
    reference = registry.reference_of(call.name)
    try:
        with torch.no_grad():
            expected = reference(*arguments)
    except Exception:
        return ""
    names = {argument.name for argument in call.overload._schema.arguments}
    defined = mutant.exact and (not mutant.changes or not names & RESULTS)
    if not (defined and _all_finite(arguments)):
        return difference(_flat(got), _flat(expected), None)
    dtypes = [value.dtype for value in arguments if isinstance(value, torch.Tensor)]
    tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
    complaint = difference(_flat(got), _flat(expected), tolerance)
    # A reference in half precision may itself be the one that is far from the truth.
    if complaint and not difference(_flat(got), _exact(reference, arguments, _flat(expected)), tolerance):
        return ""
    return complaint


def _exact(reference: Callable[..., Any], arguments: Sequence[Any], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The reference's results in float64 arithmetic, in the dtypes of `like`."""
    doubled = [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    ]
    with torch.no_grad():
        return [found.to(one.dtype) for found, one in zip(_flat(reference(*doubled)), like)]


def difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float | None) -> str:
    """What differs, in words; empty where the results agree. `tolerance` None: shapes and dtypes only."""
    if len(got) != len(expected):
        return f"{len(got)} results, the reference has {len(expected)}"
    for number, (mine, other) in enumerate(zip(got, expected)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return f"result {number} is {describe(mine)}, of the reference {describe(other)}"
        if tolerance is None or mine.is_meta or mine.layout != torch.strided or not mine.numel():
            continue
        if mine.dtype == torch.int16:  # bits that rounding took from another result: two roundings, other bits
            continue
        left, right = mine.detach().double(), other.detach().double()
        known = right.isfinite()
        if not torch.equal(left.isfinite() & known, known):
            return f"result {number} is not finite where the reference is"
        if not known.any():
            continue
        error, scale = (left - right)[known].abs().max().item(), right[known].abs().max().item()
        if error > tolerance * max(scale, 1e-2):
            return f"result {number} is {error:.3g} from the reference, whose largest element is {scale:.3g}"
    return ""


def describe(value: Any) -> str:
    """An argument in a few words."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(one) for one in value[:8]) + (", …]" if len(value) > 8 else "]")
    if not isinstance(value, torch.Tensor):
        return repr(value)
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided:
        return f"{kind}{list(value.shape)} {value.layout}"
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{kind}{list(value.shape)}{strides}{' meta' if value.is_meta else ''}"


def text_of(call: Call, mutant: Mutant) -> str:
    """The whole call in one line."""
    arguments = ", ".join(describe(argument) for argument in mutant.arguments)
    return f"{call.op}({arguments}); from {call.origin}; changed {mutant.changes or 'nothing'}"


def confine(sanitized: bool) -> None:
    """No core files; less memory than the machine has; fresh memory that is not zero, as far as the system can."""
    warnings.simplefilter("ignore", UserWarning)  # PyTorch's about sparse and other odd tensors, which mutants are
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sanitized:  # its shadow memory is larger than any limit; ASAN_OPTIONS has limits and a fill of its own
        return
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_PERTURB, FILL_BYTE)


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _all_finite(arguments: Sequence[Any]) -> bool:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.is_floating_point()]
    small = all(t.layout == torch.strided and not t.is_meta and t.numel() <= MOST_COMPARED for t in tensors)
    return small and all(bool(t.detach().isfinite().all()) for t in tensors if t.numel())
