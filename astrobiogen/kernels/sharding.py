"""How the ops run on distributed tensors (`torch.distributed.tensor.DTensor`): which placements an op takes and gives.

Imported by the first call that meets a distributed tensor (`checks.check_tensor`); nobody else pays for it. A rule
lists, for one axis of the device mesh, pairs (placements of the results, placements of the arguments), all replicated
first: PyTorch takes the cheapest pair and redistributes what does not fit. Work on whole rows takes any sharding of the
rows; a weight that every row meets is replicated, and its gradient is a partial sum.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from astrobiogen.kernels import registry

Places = Sequence[Placement | None]
Rule = tuple[Places, Places]

R, SUM = Replicate(), Partial()


def _rows(x: Any) -> list[Shard]:
    return [Shard(axis) for axis in range(x.ndim - 1)]


def _rms_norm(x: Any, *rest: Any) -> list[Rule]:
    del rest
    return [([at, at], [at, R, None]) for at in (R, *_rows(x))]


def _add_rms_norm(x: Any, *rest: Any) -> list[Rule]:
    del rest
    return [([at, at, at], [at, at, R, None]) for at in (R, *_rows(x))]


def _rms_norm_backward(grad: Any, x: Any, weight: Any, rstd: Any, grad_sum: Any) -> list[Rule]:
    del grad, weight, rstd

    def other(at: Placement) -> Placement | None:
        return None if grad_sum is None else at

    split: list[Rule] = [([at, SUM], [at, at, R, at, other(at)]) for at in _rows(x)]
    return [([R, R], [R, R, R, R, other(R)]), *split]


def _pointwise(results: int, tensors: int, *, last: bool) -> Callable[..., list[Rule]]:
    """Equal placements of everything; the last axis only if `last`."""

    def rule(x: Any, *rest: Any) -> list[Rule]:
        del rest
        places = (R, *_rows(x), *([Shard(x.ndim - 1)] if last and x.ndim else []))
        return [([at] * results, [at] * tensors) for at in places]

    return rule


def _rope(x: Any, cos: Any, *rest: Any) -> list[Rule]:
    del rest
    batch = Shard(0) if cos.ndim == 3 and cos.shape[0] == x.shape[0] and x.shape[0] > 1 else R
    tables = ((R, R), (Shard(0), batch), (Shard(1), Shard(cos.ndim - 2)), (Shard(2), R))
    return [([at], [at, table, table, None, None]) for at, table in tables]


def _linear(x: Any, weight: Any, bias: Any) -> list[Rule]:
    del weight
    last = Shard(x.ndim - 1)
    rules: list[Rule] = [([at], [at, R, R]) for at in (R, *_rows(x))]
    rules += [([last], [R, Shard(0), Shard(0)]), ([SUM], [last, Shard(1), SUM]), ([SUM], [SUM, R, SUM])]
    return [(out, given if bias is not None else [*given[:2], None]) for out, given in rules]


def _linear_backward(grad: Any, x: Any, weight: Any, need_x: bool, need_weight: bool) -> list[Rule]:
    del grad, weight
    last = Shard(x.ndim - 1)
    rules: list[tuple[Places, Places]] = [([R, R], [R, R, R])]
    rules += [([at, SUM], [at, at, R]) for at in _rows(x)]
    rules += [([SUM, Shard(0)], [last, R, Shard(0)]), ([last, Shard(1)], [R, last, Shard(1)])]
    needed = (need_x, need_weight)  # an empty tensor for the other
    return [([at if need else R for at, need in zip(out, needed)], [*given, None, None]) for out, given in rules]


def _present(arguments: Sequence[Any], places: Sequence[Placement]) -> list[Placement | None]:
    """`places` of the arguments that are given; a rule has no entry for the others, and for what is no tensor."""
    known = [None if argument is None else place for argument, place in zip(arguments, places)]
    return [*known, *[None] * (len(arguments) - len(places))]


def _attention_places(q: Any, k: Any, v: Any, cos: Any) -> list[tuple[Placement, ...]]:
    """Placements of [B, S, heads, D], of [B, heads, S], of the angles and the sinks: split by batch, and by head where
    every part has whole groups of query heads."""
    angles = Shard(0) if cos is not None and cos.ndim == 3 and q.shape[0] > 1 else R
    places: list[tuple[Placement, ...]] = [(R, R, R, R), (Shard(0), Shard(0), angles, R)]
    split = (any(t.placements[axis] == Shard(2) for t in (q, k, v)) for axis in range(q.mesh.ndim))
    parts = math.prod(size for size, is_split in zip(q.mesh.shape, split) if is_split)
    return [*places, (Shard(2), Shard(1), R, Shard(0))] if k.shape[2] % parts == 0 else places


def _rest(at: Placement, of_rows: Placement, q: Any, keep: bool = True) -> Placement:
    """Of what rounding took: from the output in half precision, else from the log-sum-exp; empty without `keep`."""
    if not keep:
        return R
    return at if q.tensor_meta.dtype in (torch.float16, torch.bfloat16) else of_rows


def _attention(*arguments: Any) -> list[Rule]:
    q, k, v, cos = arguments[:4]
    return [
        (
            [at, of_rows, _rest(at, of_rows, q, arguments[-1])],
            _present(arguments, (at, at, at, angles, angles, R, at_sinks)),
        )
        for at, of_rows, angles, at_sinks in _attention_places(q, k, v, cos)
    ]


def _attention_backward(*arguments: Any) -> list[Rule]:
    q, k, v, _, _, _, cos, _, _, sinks = arguments[2:12]
    rules: list[Rule] = []
    for at, of_rows, angles, at_sinks in _attention_places(q, k, v, cos):
        of_sinks = R if sinks is None else SUM if at == Shard(0) else at_sinks  # without sinks: an empty tensor
        places = (at, of_rows, at, at, at, at, of_rows, _rest(at, of_rows, q), angles, angles, R, at_sinks)
        rules.append(([at, at, at, of_sinks], _present(arguments, places)))
    return rules


def _loss(x: Any, weight: Any, target: Any, *rest: Any) -> list[Rule]:
    del x, weight, target
    return [([at, at], [at, R, at, *[None] * len(rest)]) for at in (R, Shard(0))]


def _loss_backward(grad: Any, x: Any, weight: Any, target: Any, lse: Any, *rest: Any) -> list[Rule]:
    del grad, x, weight, target, lse
    *_, need_x, need_weight = rest
    return [
        ([at if need_x else R, total if need_weight else R], [at, at, R, at, at, *[None] * len(rest)])
        for at, total in ((R, R), (Shard(0), SUM))
    ]


def _loss_gradients(x: Any, weight: Any, target: Any, divisor: Any, *rest: Any) -> list[Rule]:
    del x, weight, target, divisor
    *_, need_x, need_weight = rest
    return [
        ([total, at if need_x else R, total if need_weight else R], [at, R, at, R, *[None] * len(rest)])
        for at, total in ((R, R), (Shard(0), SUM))
    ]


RULES: dict[str, Callable[..., list[Rule]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "swiglu": _pointwise(1, 2, last=True),
    "swiglu_backward": _pointwise(2, 3, last=True),
    "swiglu_backward_product": _pointwise(3, 3, last=True),
    "swiglu_packed": _pointwise(1, 1, last=False),
    "swiglu_packed_backward": _pointwise(1, 2, last=False),
    "rope": _rope,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "linear_cross_entropy": _loss,
    "linear_cross_entropy_backward": _loss_backward,
    "linear_cross_entropy_gradients": _loss_gradients,
}


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"astrobiogen::{name} has no rule for distributed tensors (DTensor); it runs on ordinary ones: shard by "
            "sample and call it on `x.to_local()`, by `torch.distributed.tensor.experimental.local_map`, or take "
            "`x.full_tensor()`"
        )

    return refuse


def _register() -> None:
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in registry.ops():
        op = getattr(torch.ops.astrobiogen, name).default
        if name not in RULES:
            torch.library.register_torch_dispatch(op, DTensor, _refusal(name))
            continue
        register_sharding(op)(RULES[name])
        # PyTorch caches a decision by the tensors' placements and by int arguments only, and then calls the op with the
        # cached other arguments: rope backward would turn as forward did. Every argument belongs to the key.
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(0, needs_pytree=True)


_register()
