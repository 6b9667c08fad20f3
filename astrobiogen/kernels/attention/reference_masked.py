"""Products over visible pairs only, in plain PyTorch: what a hidden pair holds, NaN included, reaches neither a value
nor a derivative. (A matrix product gives 0 * NaN = NaN for a weight of 0.)

Each is the other's derivative, so both can be differentiated any number of times, in reverse and in forward mode.
(`torch.compile` traces no autograd function that has a `jvp`; there the ones without serve.)
"""

from typing import Any

import torch


def product(weights: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_j weights[..., i, j] values[..., j, :] over the j with mask[i, j]; the hidden `weights` must be 0.

    A row whose visible values hold NaN or Inf is NaN in those columns.
    """
    function = _Product if torch.compiler.is_compiling() else _ProductWithTangents
    return function.apply(weights, values, mask)  # pyright: ignore[reportReturnType]


def pairs(left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """<left[..., i, :], right[..., j, :]> where mask[i, j], 0 elsewhere."""
    function = _Pairs if torch.compiler.is_compiling() else _PairsWithTangents
    return function.apply(left, right, mask)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bad = ~torch.isfinite(values)
        heard = mask.to(weights.dtype) @ bad.to(weights.dtype) > 0
        return (weights @ values.masked_fill(bad, 0.0)).masked_fill(heard, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        weights, values, mask = ctx.saved_tensors
        return pairs(grad, values, mask), product(weights.transpose(-1, -2), grad, mask.transpose(-1, -2)), None


class _Pairs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (left @ right.transpose(-1, -2)).masked_fill(~mask, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        left, right, mask = ctx.saved_tensors
        grad = grad.masked_fill(~mask, 0.0)
        return product(grad, right, mask), product(grad.transpose(-1, -2), left, mask.transpose(-1, -2)), None


class _ProductWithTangents(_Product):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, weights: torch.Tensor | None, values: torch.Tensor | None, _: None) -> torch.Tensor:
        old_weights, old_values, mask = ctx.saved_tensors
        parts = [] if weights is None else [product(weights.masked_fill(~mask, 0.0), old_values, mask)]
        parts += [] if values is None else [product(old_weights, values, mask)]
        return sum(parts[1:], parts[0])


class _PairsWithTangents(_Pairs):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        _Pairs.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, left: torch.Tensor | None, right: torch.Tensor | None, _: None) -> torch.Tensor:
        old_left, old_right, mask = ctx.saved_tensors
        parts = [] if left is None else [pairs(left, old_right, mask)]
        parts += [] if right is None else [pairs(old_left, right, mask)]
        return sum(parts[1:], parts[0])
