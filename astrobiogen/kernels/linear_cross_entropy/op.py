"""The op `linear_cross_entropy`: schema, shapes, argument checks, gradient formula and public function."""

import math
from typing import Any

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.checks import (
    check_float,
    check_int,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from astrobiogen.kernels.linear_cross_entropy import reference
from astrobiogen.kernels.values import is_batched

_TRITON = "astrobiogen.kernels.linear_cross_entropy.triton_kernels"
LARGEST_VOCABULARY = 2**31 - 1  # classes are counted in 32 bits
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_tokens: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits x W^T against `target`, without ever holding the [tokens, vocabulary] logits.

    z = x W^T (z = softcap * tanh(x W^T / softcap) with a cap), lse = log sum_j exp z_j, and per token with target y

    loss = lse - (1 - label_smoothing) z_y - label_smoothing mean_j z_j + z_loss lse^2,

    in nats: `F.cross_entropy(F.linear(x, weight), target, ...)` plus the z-loss of PaLM (arXiv:2204.02311) and the soft
    cap of Gemma 2 (arXiv:2408.00118). Forward: one GEMM, kept as (lse, loss) per token; backward: recomputes the logits
    tile by tile; three GEMMs. On the CPU in float32 or bfloat16 with a scalar loss both gradients are computed in the
    forward pass from the same logits, three GEMMs in all, and kept until the backward pass. bfloat16 logits are rounded
    to bfloat16, as `F.linear` rounds them, where the device multiplies bfloat16. Under autocast, `x` and `weight` are
    cast to the autocast dtype (float64 stays), as for `F.linear`, and the loss is float32, as of `F.cross_entropy`.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H] with the dtype and device of `x`.
        target: [...], int64, the leading shape of `x`; class indices in [0, V), or `ignore_index`.
        ignore_index: tokens with this target give no loss and no gradient and are not counted.
        reduction: "mean" over the counted tokens, "sum", or "none" for the loss per token. As with `F.cross_entropy`,
            the mean over no token at all is NaN (0 / 0), with gradients of exactly 0.
        label_smoothing: share in [0, 1] of the target mass spread evenly over the vocabulary.
        z_loss: weight >= 0 of lse^2, which keeps the logits from drifting.
        softcap: bound > 0 on |z|, or None.
        num_tokens: replaces the count in the mean (an int > 0, or a 0-d tensor on the CPU or the device of `x`), e.g.
            the tokens of all micro-batches of one optimizer step, so that gradient accumulation weights every token
            alike.

    Returns:
        Scalar, or [...] for "none"; float32 (float64 for float64 input), also for half-precision `x`: the loss is not
        rounded to it.

    Raises:
        TypeError: a dtype or type is not one of the above.
        ValueError: shapes, devices or options do not fit.
        RuntimeError: a target is outside [0, V) and not `ignore_index` (on CUDA a device-side assertion; nothing is
            read out of bounds), or a second derivative is asked for.
    """
    _check_tensors(x, weight, target)
    ignore_index = check_int("ignore_index", ignore_index)
    _check_options(reduction, label_smoothing, z_loss, softcap)
    num_tokens = _check_num_tokens(num_tokens, reduction, x)
    x, weight = autocast.lower_precision(x, weight)
    check_same_dtype(x=x, weight=weight)
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    options = (ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0))
    if _gradients_in_forward(rows, weight, reduction):
        divisor = _divisor(labels, ignore_index, reduction, num_tokens)
        need = (rows.requires_grad, weight.requires_grad)
        return torch.ops.astrobiogen.linear_cross_entropy_gradients(rows, weight, labels, divisor, *options, *need)[0]
    if registry.reference_selected():
        loss = autocast.reference(reference.linear_cross_entropy, rows, weight, labels, *options)
    else:
        loss = torch.ops.astrobiogen.linear_cross_entropy(rows, weight, labels, *options)[0]
    if reduction == "none":
        return loss.reshape(target.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((labels != ignore_index).sum() if num_tokens is None else num_tokens)


def _gradients_in_forward(x: torch.Tensor, weight: torch.Tensor, reduction: str) -> bool:
    """Whether the gradients come with the loss: three GEMMs instead of four, for the logits of some of the tokens (4
    bytes each for at most 288 tokens; bf16 with hardware products 2 bytes each for a third). A GPU would have to
    hold an fp32 [V, H] sum from forward to backward (README).
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and reduction != "none"
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and not registry.reference_selected()
    )


def _divisor(
    labels: torch.Tensor, ignore_index: int, reduction: str, num_tokens: int | torch.Tensor | None
) -> torch.Tensor:
    """What the summed loss is divided by, as a 0-d float32 tensor on the device of `labels`."""
    if reduction == "sum":
        return torch.ones((), device=labels.device)
    if num_tokens is None:
        return (labels != ignore_index).sum().to(torch.float32)
    return torch.as_tensor(num_tokens, dtype=torch.float32, device=labels.device)


def _check_tensors(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> None:
    check_float("x", x)
    check_float("weight", weight)
    if check_tensor("target", target).dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., H] with H >= 1, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not 1 <= weight.shape[0] <= LARGEST_VOCABULARY:
        raise ValueError(
            f"weight must have shape [V, {x.shape[-1]}] with V in [1, 2^31 - 1] ({x.shape[-1]}: the last axis of x), "
            f"got {tuple(weight.shape)}"
        )
    check_shape("target", target, tuple(x.shape[:-1]), "the shape of x without its last axis")
    check_same_device(x=x, weight=weight, target=target)


def _check_options(
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    if softcap is not None:
        check_number("softcap", softcap)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or a finite number > 0, got {softcap!r}")


def _check_num_tokens(
    num_tokens: int | torch.Tensor | None, reduction: str, x: torch.Tensor
) -> int | torch.Tensor | None:
    if num_tokens is None:
        return None
    if reduction != "mean":
        raise ValueError(f"num_tokens is the divisor of reduction='mean'; got it with reduction={reduction!r}")
    if isinstance(num_tokens, torch.Tensor):
        if num_tokens.dim() != 0:
            raise ValueError(
                f"num_tokens must be an int or a 0-d tensor, got a tensor of shape {tuple(num_tokens.shape)}"
            )
        if num_tokens.device not in (x.device, torch.device("cpu")):
            raise ValueError(f"num_tokens must be on the device of x, {x.device}, or the CPU, got {num_tokens.device}")
        return num_tokens
    return check_int("num_tokens", num_tokens, 1)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *options: float
) -> tuple[torch.Tensor, torch.Tensor]:
    del weight, target, options
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float64)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, *options: float
) -> tuple[torch.Tensor, torch.Tensor]:
    del grad, target, lse
    *_, need_x, need_weight = options
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, target, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, target, output[1])
    ctx.options = options


def _backward(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    del grad_lse  # lse is internal: the public function never returns it
    need_x, need_weight, *_ = ctx.needs_input_grad
    if grad is None or not (need_x or need_weight):
        return (None,) * 7
    x, weight, target, lse = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.astrobiogen.linear_cross_entropy_backward(
        grad, x, weight, target, lse, *ctx.options, need_x, need_weight
    )
    return (grad_x if need_x else None, grad_weight if need_weight else None, None, None, None, None, None)


def _fake_gradients(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, divisor: torch.Tensor, *options: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del target, divisor
    *_, need_x, need_weight = options
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return total, x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, target, divisor, *options, need_x, need_weight = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, target, divisor, *output[1:])
    ctx.options, ctx.needed, ctx.given = options, (need_x, need_weight), False


def _backward_gradients(
    ctx: Any, grad: torch.Tensor | None, *of_gradients: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    del of_gradients  # not differentiable
    if grad is None:
        return (None,) * 10
    x, weight, target, divisor, *gradients = ctx.saved_tensors
    if torch.is_grad_enabled():
        # create_graph=True: take the op that refuses a second derivative by name, where constants would pass for one.
        lse = torch.ops.astrobiogen.linear_cross_entropy(x, weight, target, *ctx.options)[1]
        upstream = (grad / divisor).expand_as(target)
        gradients = torch.ops.astrobiogen.linear_cross_entropy_backward(
            upstream, x, weight, target, lse.detach(), *ctx.options, *ctx.needed
        )
        return (*(g if need else None for g, need in zip(gradients, ctx.needed)), *(None,) * 8)
    if ctx.given:  # a second run of the graph: the first one's caller owns the gradients, and may have changed them
        gradients = torch.ops.astrobiogen.linear_cross_entropy_gradients(
            x, weight, target, divisor, *ctx.options, *ctx.needed
        )[1:]
    ctx.given = True
    return (*(_scaled(g, grad) if need else None for g, need in zip(gradients, ctx.needed)), *(None,) * 8)


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient * upstream, in the memory of `gradient`, which is given away with it: no second [V, H] matrix.

    Through an alias with a version counter of its own: autograd would refuse to run the graph again after
    `.grad.zero_()`.
    A factor of 1, as from `loss.backward()`, costs nothing where its value can be read without waiting for a device.
    """
    if type(upstream) is not torch.Tensor or is_batched(upstream):  # traced, or several: no value to read
        return gradient * upstream
    own = gradient.data
    return own if upstream.device.type == "cpu" and upstream.item() == 1.0 else own.mul_(upstream)


registry.define(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    operands="x: float tokens H; weight: x V H; target: int64 tokens",
    reference=reference.linear_cross_entropy_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:linear_cross_entropy",
)
registry.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor target, Tensor lse, "
    f"{_OPTIONS}, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    operands="x: float tokens H; weight: x V H; target: int64 tokens; grad: any tokens; lse: double tokens",
    reference=reference.linear_cross_entropy_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:linear_cross_entropy_backward",
)
registry.differentiable("linear_cross_entropy", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("linear_cross_entropy_backward")
registry.define(
    "linear_cross_entropy_gradients(Tensor x, Tensor weight, Tensor target, Tensor divisor, "
    f"{_OPTIONS}, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)",
    operands="x: float tokens H; weight: x V H; target: int64 tokens; divisor: any",
    cpu_rule="PyTorch's products, tile by tile: bf16 with AVX512_BF16, and fp32 on Intel's cores with MKL from 1,024 "
    "hidden columns on or up to 16 tokens; own products: other fp32; the loss and its backward one after the other: "
    "fp64 and other half precision",
    reference=reference.linear_cross_entropy_gradients,
    fake=_fake_gradients,
    triton=f"{_TRITON}:linear_cross_entropy_gradients",
)
registry.differentiable("linear_cross_entropy_gradients", backward=_backward_gradients, setup_context=_setup_gradients)
