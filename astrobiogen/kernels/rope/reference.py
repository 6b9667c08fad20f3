"""Rotary position embedding in plain PyTorch: the definition that the kernels are held to.

Pairs of columns (a, b) of each head turn by the angle of their token:  a' = a cos - b sin,  b' = b cos + a sin
(Su et al. 2021, arXiv:2104.09864)

With r = rotary columns, pair i is (i, i + r/2) ("rotate-half") or (2i, 2i + 1) ("interleaved"); columns from r on are
copied.
Taken in fp32 (fp64 for fp64 input) and rounded once to the dtype of x.
"""

import torch


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, transposed: bool) -> torch.Tensor:
    """The op `rope`: x [B, S, heads, D], cos and sin [S, r/2] or [B, S, r/2]; `transposed` negates sin, which is the
    gradient's rotation."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    wide_cos = cos.to(accumulate).unsqueeze(-2)
    wide_sin = sin.to(accumulate).unsqueeze(-2)
    if transposed:
        wide_sin = -wide_sin
    half = cos.shape[-1]
    rotary, rest = x[..., : 2 * half].to(accumulate), x[..., 2 * half :]
    if interleaved:
        first, second = rotary.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = rotary[..., :half], rotary[..., half:]
    turned = (first * wide_cos - second * wide_sin, second * wide_cos + first * wide_sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), rest), dim=-1)
