"""The op `rope`: schema, shapes, argument checks, gradient formula and public function."""

from typing import Any

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.checks import check_float, check_same_device, check_same_dtype
from astrobiogen.kernels.rope import reference


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of all heads, for any rotary width.

    With r = 2 * cos.shape[-1] rotary columns, pair i of a head is (x[i], x[i + r/2]), or (x[2i], x[2i + 1]) if
    `interleaved`; each pair (a, b)
    becomes (a cos - b sin, b cos + a sin). Columns from r on are copied (partial rotary). fp32 inside for
    half-precision input.

    `cos` and `sin` are constants: they get no gradient. The gradient of x is the transposed rotation by the same op,
    so a second derivative works.
    Build them with `astrobiogen.ops.rope_frequencies` and its scaled variants; for position ids or packed sequences
    see `rope_gather`.

    Args:
        x: [B, S, heads, D], float32, bfloat16, float16 or float64; any strides.
        cos: [S, r/2] or [B, S, r/2] (a first axis of 1 serves all of B) with r <= D; float32 or the dtype of `x`.
        sin: shape, dtype and device of `cos`.
        interleaved: how columns pair up, see above.

    Under autocast nothing changes for x, as for a rotation of PyTorch's products and sums that ends in the dtype of its
    input (``.type_as(x)``); `cos` and `sin` may have any dtype and are taken in float32 (float64 for float64 x).

    Returns:
        [B, S, heads, D], contiguous, with the dtype and device of `x`.

    Raises:
        TypeError: a tensor is not a floating-point one, a dtype is not allowed, or `interleaved` is not a bool.
        ValueError: a shape or device does not fit, or `cos` or `sin` requires a gradient.
    """
    check_float("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, S, heads, D], got {tuple(x.shape)}")
    cos, sin = autocast.constants(x, cos, sin)
    check_tables(x, cos, sin)
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be a bool, got {type(interleaved).__name__}")
    if registry.reference_selected():
        return autocast.reference(reference.rope, x, cos, sin, interleaved, False)
    return torch.ops.astrobiogen.rope(x, cos, sin, interleaved, False)


def check_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Check `cos` and `sin` against x [B, S, heads, D], with the errors that `rope` documents."""
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        if table.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{name} must be float32 or have the dtype of x, {x.dtype}, got {table.dtype}")
        registry.refuse_derivative(name, table, "it is a constant of the op")
    check_same_dtype(cos=cos, sin=sin)
    batch, length, _, width = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() in (2, 3) and table.shape[-2] == length and 2 * table.shape[-1] <= width
        if not fits or (table.dim() == 3 and table.shape[0] not in (1, batch)):
            raise ValueError(
                f"{name} must have shape [S, r/2] or [B, S, r/2] with S = {length}, B = {batch} or 1, "
                f"r/2 <= {width // 2} "
                f"for x of shape {tuple(x.shape)}, got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
    check_same_device(x=x, cos=cos, sin=sin)


def _check_raw(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_unused: Any) -> None:
    rows = (x.shape[1],), (1, x.shape[1]), (x.shape[0], x.shape[1])
    if cos.shape[:-1] not in rows or sin.shape != cos.shape or 2 * cos.shape[-1] > x.shape[3]:
        raise ValueError(
            f"rope: cos and sin must have shape [S, R] or [B, S, R] with 2 R <= D for x [B, S, heads, D] = "
            f"{tuple(x.shape)}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def _fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, transposed: bool) -> torch.Tensor:
    del cos, sin, interleaved, transposed
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    _, cos, sin, ctx.interleaved, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    return torch.ops.astrobiogen.rope(grad, cos, sin, ctx.interleaved, not ctx.transposed), None, None, None, None


registry.define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> Tensor",
    operands="x: float B S heads D; cos: any *table R; sin: any *table R",
    also=_check_raw,
    reference=reference.rope,
    fake=_fake,
    triton="astrobiogen.kernels.rope.triton_kernels:rope",
)
registry.differentiable("rope", backward=_backward, setup_context=_setup)
