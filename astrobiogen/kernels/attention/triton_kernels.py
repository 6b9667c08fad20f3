"""The attention ops on NVIDIA GPUs. Launches: triton_launch.py; tiles: triton_config.py."""

from typing import Any

import torch

from astrobiogen.kernels.attention import reference, triton_config, triton_launch
from astrobiogen.kernels.attention.reference import Options
from astrobiogen.kernels.attention.triton_cases import cases
from astrobiogen.kernels.cases import CompileCase


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options_and_keep: Any) -> reference.OpForward:
    """The op `attention` on CUDA."""
    *options, keep = options_and_keep
    batch, queries, heads, _dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide)
    rest = reference.empty_rest(q, lse, keep)
    if out.numel() == 0:
        return out, lse, rest
    if q.dtype == torch.float64:  # gradient checks only: no tensor-core path and no fp64 tiles
        return reference.attention_forward(q, k, v, *options_and_keep)
    p = triton_launch.make_problem(triton_launch.machine_of(q.device), q, k, Options(*options))
    few = queries <= triton_config.FEW_QUERIES and p.options.cu_seqlens is None
    (triton_launch.attend_few if few else triton_launch.attend)(p, v, out, lse, rest)
    return out, lse, rest


def attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor,
    *options: Any,
) -> reference.Backward:
    """The op `attention_backward` on CUDA."""
    if q.dtype == torch.float64:
        return reference.attention_backward(grad_out, grad_lse, q, k, v, out, lse, rest, *options)
    sinks = Options(*options).sinks
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    if q.numel() == 0:
        grad_sinks = q.new_empty(0, dtype=torch.float32) if sinks is None else torch.zeros_like(sinks)
        return grads[0], grads[1].zero_(), grads[2].zero_(), grad_sinks
    p = triton_launch.make_problem(triton_launch.machine_of(q.device), q, k, Options(*options))
    grad = torch.zeros_like(out) if grad_out is None else grad_out
    constants = triton_launch.row_constants(p, grad, out, lse, rest, grad_lse)
    triton_launch.differentiate(p, v, grad, constants, grads)
    if sinks is None:
        return *grads, q.new_empty(0, dtype=torch.float32)
    # [B, Hq, Sq]: the sink's share of every row, by the same exponential as the probabilities that delta is for.
    weight = torch.exp2(sinks.float()[:, None] * triton_launch.LOG2E - constants.log_sums[..., : q.shape[1]])
    return *grads, (-weight * constants.delta[..., : q.shape[1]]).sum(dim=(0, 2)).to(sinks.dtype)


def compile_cases() -> tuple[CompileCase, ...]:
    """Every kernel at every benchmark head dimension and target, for the ahead-of-time gate."""
    return cases()
