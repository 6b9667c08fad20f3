"""Random changes that make a valid call a wrong, odd or extreme one."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

LARGEST = 2**63 - 1
INTEGERS = (0, -1, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**32, 2**62, LARGEST, -(2**31), -(2**63))
FLOATS = (0.0, -1.0, 1.0, 0.5, 2.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e300, -1e300, 1e-310, 1e30)
INDICES = (-1, -100, 10**9, 2**31, 2**62, LARGEST, -(2**63))
# Sizes that no memory holds: a tensor of such a size exists only by a stride of 0.
MOST_SPARSE = 1_000_000
HUGE = (2**31, 2**40, 2**62)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip
Edit = Callable[[torch.Tensor, random.Random], Any]


@dataclasses.dataclass
class Mutant:
    """A changed call.

    Attributes:
        arguments: of the call.
        changes: in words; empty for the valid call itself.
        exact: whether a correct result can be compared by value: no NaN, infinity or extreme number was put in.
    """

    arguments: list[Any]
    changes: list[str]
    exact: bool = True


def mutate(arguments: Sequence[Any], draw: random.Random) -> Mutant:
    """One to three changes, or none in one of ten calls. The arguments given are not changed."""
    mutant = Mutant([list(a) if isinstance(a, list) else a for a in arguments], [])
    count = 0 if draw.random() < 0.1 else draw.choices((1, 2, 3), (6, 3, 1))[0]
    for _ in range(count):
        _change(mutant, draw)
    return mutant


def _change(mutant: Mutant, draw: random.Random) -> None:
    index = draw.randrange(len(mutant.arguments))
    value = mutant.arguments[index]
    if draw.random() < 0.08:
        other = draw.randrange(len(mutant.arguments))
        mutant.arguments[index], mutant.arguments[other] = mutant.arguments[other], value
        mutant.changes.append(f"{index} and {other} swapped")
        return
    name, mutant.arguments[index] = _changed(mutant, value, draw)
    mutant.changes.append(f"{index}: {name}")


def _changed(mutant: Mutant, value: Any, draw: random.Random) -> tuple[str, Any]:
    if isinstance(value, torch.Tensor):
        return _changed_tensor(mutant, value, draw)
    if isinstance(value, bool):
        return "flipped", not value
    if isinstance(value, int):
        new = draw.choice((*INTEGERS, value + 1, value - 1))
        return f"integer {new}", new
    if isinstance(value, float):
        new = draw.choice(FLOATS)
        mutant.exact = False
        return f"number {new}", new
    if isinstance(value, list):
        return _changed_list(mutant, value, draw)
    tensors = [one for one in mutant.arguments if isinstance(one, torch.Tensor)]
    if value is None and tensors:
        return "given", draw.choice(tensors)
    return "None", None


def _changed_list(mutant: Mutant, value: list[Any], draw: random.Random) -> tuple[str, list[Any]]:
    new = list(value)
    how = draw.choice(("entry", "entry", "entry", "dropped", "longer", "empty", "swapped"))
    if how == "entry" and new:
        at = draw.randrange(len(new))
        name, new[at] = _changed(mutant, new[at], draw)
        return f"entry {at} {name}", new
    if how == "dropped" and new:
        new.pop(draw.randrange(len(new)))
    elif how == "longer" and new:
        new += [draw.choice(new)] * draw.choice((1, 2, 100))
    elif how == "swapped" and len(new) > 1:
        left, right = draw.sample(range(len(new)), 2)
        new[left], new[right] = new[right], new[left]
    else:
        new = []
    return how, new


def _changed_tensor(mutant: Mutant, value: torch.Tensor, draw: random.Random) -> tuple[str, Any]:
    if not inside_storage(value):
        return "left as it is", value  # PyTorch itself would read the memory that is gone
    edits = INDEX_EDITS if value.dtype in (torch.int64, torch.int32) and draw.random() < 0.5 else EDITS
    name = draw.choice(sorted(edits))
    try:
        new = edits[name](value, draw)
    except (RuntimeError, IndexError, ValueError, TypeError):  # PyTorch cannot make such a tensor of this one
        return f"{name} is impossible", value
    if name in ("nonfinite", "extreme"):
        mutant.exact = False
    return name, new


def extent_of(tensor: torch.Tensor) -> int:
    """Elements of memory from the first to the last of `tensor`."""
    return 0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))


def inside_storage(tensor: torch.Tensor) -> bool:
    """False where the memory of a dense CPU tensor was taken away."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return True
    needed = (tensor.storage_offset() + extent_of(tensor)) * tensor.element_size()
    return tensor.numel() == 0 or needed <= tensor.untyped_storage().nbytes()


def _random(like: torch.Tensor, shape: Sequence[int], draw: random.Random) -> torch.Tensor:
    """Values of the kind of `like`: normal numbers, or entries of an index tensor."""
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(like.dtype)
    flat = like.reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(tuple(shape), dtype=like.dtype)
    return flat[torch.randint(0, flat.numel(), tuple(shape), generator=generator)]


def _resized(choices: Callable[[int], Sequence[int]]) -> Edit:
    def edit(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
        axis = draw.randrange(t.dim())
        shape = list(t.shape)
        shape[axis] = max(0, draw.choice(choices(shape[axis])))
        return _random(t, shape, draw)

    return edit


def _huge(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    axis = draw.randrange(t.dim())
    shape = list(t.shape)
    shape[axis] = draw.choice(HUGE)
    return t.narrow(axis, 0, min(1, t.shape[axis])).expand(shape)


def _sparse(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Of a huge view without its elements: to look at all of them takes for ever."""
    del draw
    if t.numel() < MOST_SPARSE:
        return t.to_sparse()
    place = torch.empty(t.dim(), 0, dtype=torch.int64)
    return torch.sparse_coo_tensor(place, torch.empty(0), t.shape, dtype=t.dtype, check_invariants=False)


def _overlapping(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return t.as_strided(t.shape, [draw.choice((0, 1, s)) for s in t.stride()], t.storage_offset())


def _spread(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same values, every axis with gaps."""
    wide = t.new_zeros([2 * n for n in t.shape])
    view = wide[tuple(slice(draw.randrange(2), None, 2) for _ in t.shape)]
    return view.copy_(t)


def _permuted(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same values, axes in another order in memory."""
    order = draw.sample(range(t.dim()), t.dim())
    back = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)


def _poked(values: Sequence[float]) -> Edit:
    def edit(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
        new = t.clone()
        new.view(-1)[draw.randrange(t.numel())] = draw.choice(values)
        return new

    return edit


def _freed(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    new = t.clone()
    new.untyped_storage().resize_(draw.choice((0, new.untyped_storage().nbytes() // 2)))
    return new


EDITS: dict[str, Edit] = {
    "axis dropped": lambda t, draw: t.select(draw.randrange(t.dim()), 0),
    "axis added": lambda t, draw: t.unsqueeze(draw.randrange(t.dim() + 1)),
    "axes swapped": lambda t, draw: t.transpose(draw.randrange(t.dim()), draw.randrange(t.dim())),
    "flat": lambda t, _: t.reshape(-1),
    "one number": lambda t, draw: _random(t, (), draw),
    "no elements": lambda t, _: t.new_empty(0),
    "axis longer": _resized(lambda n: (n + 1, n + 1, 2 * n, n + 17)),
    "axis shorter": _resized(lambda n: (n - 1, n - 1, n // 2, 1, 0)),
    "huge": _huge,
    "overlapping": _overlapping,
    "spread": _spread,
    "permuted": _permuted,
    "dtype": lambda t, draw: t.to(draw.choice(DTYPES)),
    "meta": lambda t, _: t.to("meta"),
    "sparse": _sparse,
    "freed storage": _freed,
    "negative bit": lambda t, _: torch._neg_view(t),
    "None": lambda *_: None,
    "with gradient": lambda t, _: t.clone().requires_grad_(),
    "nonfinite": _poked((float("nan"), float("inf"), float("-inf"))),
    "extreme": _poked((3e38, -3e38, 1e-40, 65504.0)),
}
INDEX_EDITS: dict[str, Edit] = {
    "index": _poked(INDICES),
    "shifted": lambda t, draw: t + draw.choice((1, -1)),
    "shuffled": lambda t, draw: t[
        torch.randperm(t.numel(), generator=torch.Generator().manual_seed(draw.getrandbits(32)))
    ],
    "constant": lambda t, draw: torch.full_like(t, int(t.view(-1)[draw.randrange(t.numel())])),
}
