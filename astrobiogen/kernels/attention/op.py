"""The op `attention`: schema, shapes, argument checks, gradient formula and public function."""

import math
from typing import Any, Literal, overload

import torch

from astrobiogen.kernels import autocast, registry
from astrobiogen.kernels.attention import reference
from astrobiogen.kernels.checks import (
    INT32_SAFE,
    check_float,
    check_int,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from astrobiogen.kernels.values import needs_gradient

_TRITON = "astrobiogen.kernels.attention.triton_kernels"
MAX_HEAD_DIM = 256


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    interleaved: bool = False,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    interleaved: bool = False,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention, rotary embedding inside, for any head dimension up to 256 (Dao 2023, arXiv:2307.08691).

    s_ij = scale * <rot(q_i), rot(k_j)>;  s_ij = softcap * tanh(s_ij / softcap) with a softcap;
    out_i = sum_j exp(s_ij - lse_i) v_j over the keys j that query i sees;  lse_i = log(sum_j exp(s_ij) [+ exp(sink)]).
    Query head h reads key/value head h // (Hq / Hkv). A query that sees no key gives zeros and lse = -inf. Softmax and
    sums are fp32 for half precision. Nothing of size Sq x Sk is stored. There is no attention dropout.

    Positions: queries are aligned with the end of the keys, query i stands at key position i + Sk - Sq.

    Args:
        q: [B, Sq, Hq, D], float32, bfloat16, float16 or float64; 1 <= D <= 256; any strides.
        k: [B, Sk, Hkv, D], dtype and device of `q`; Hkv divides Hq.
        v: [B, Sk, Hkv, D].
        cos: [L, R] or [B, L, R] with L = max(Sq, Sk), R pairs rotated, 2R <= D: cosine of each position's angles; row
            L - Sk + j belongs to key j and row L - Sq + i to query i. The first 2R columns are rotated. None: no
            rotation. A constant: it must not ask for a gradient.
        sin: as `cos`; given with it or not at all.
        causal: query i sees no key behind its own position.
        scale: factor of the scores; default 1 / sqrt(D).
        window: an integer W >= 1, however large: query at position p sees keys p-W+1 .. p, and without `causal`
            p-W+1 .. p+W-1. None: no limit.
        softcap: c > 0, bounds the scores to (-c, c) after scaling. None: no bound.
        cu_seqlens: int32 or int64 [n + 1], 0 = c_0 <= c_1 <= ... <= c_n <= S: packed sequences; token t of sequence
            c_i <= t < c_(i+1) sees only that sequence; tokens from c_n on see nothing. Needs B = 1 and Sq = Sk. `cos`
            rows are per token of the packed row. The values are checked on the CPU only: on a GPU that would wait for
            the device.
        sinks: [Hq], one extra logit per head that takes part in the normalisation and carries no value.
        interleaved: rotary pairs are columns (2i, 2i + 1) instead of (i, i + R).
        return_lse: also return lse, which is differentiable.

    Under autocast, as `F.scaled_dot_product_attention`: q, k and v are cast to the autocast dtype (float64 stays);
    `cos`, `sin` and `sinks` keep their precision (bf16 angles would be 0.4 % off).

    Returns:
        out [B, Sq, Hq, D] with the dtype of `q`; with `return_lse` also lse [B, Hq, Sq], float32 (float64 for float64
        input).

    Raises:
        TypeError: a tensor argument is not a tensor of a supported dtype, or q, k, v differ in dtype.
        ValueError: shapes, devices, `window`, `softcap`, `scale` or combinations of arguments do not fit these rules.
    """
    q, k, v = autocast.lower_precision(check_float("q", q), check_float("k", k), check_float("v", v))
    _check_heads(q, k, v)
    _check_options(q, k, scale, softcap, cu_seqlens, sinks)
    compute = torch.promote_types(q.dtype, torch.float32)
    if cos is not None or sin is not None:
        cos, sin = _check_rotary(q, k, cos, sin)
        cos, sin = cos.to(compute), sin.to(compute)
    options = reference.Options(
        cos,
        sin,
        cu_seqlens,
        sinks,
        bool(causal),
        1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale),
        _window(window),
        0.0 if softcap is None else float(softcap),
        bool(interleaved),
    )
    if registry.reference_selected():
        out, lse = autocast.reference(reference.attention, q, k, v, *options)
    else:
        keep = needs_gradient(q, k, v, sinks)
        out, lse, _ = torch.ops.astrobiogen.attention(q, k, v, *options, keep)
    return (out, lse) if return_lse else out


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_same_dtype(q=q, k=k, v=v)
    check_same_device(q=q, k=k, v=v)
    if q.dim() != 4 or not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q must have shape [B, Sq, Hq, D] with 1 <= D <= {MAX_HEAD_DIM}, got {tuple(q.shape)}")
    if k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"k must have shape [{q.shape[0]}, Sk, Hkv, {q.shape[-1]}] (B and D of q), got {tuple(k.shape)}"
        )
    check_shape("v", v, tuple(k.shape), "the shape of k")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"k must have a number of heads that divides the {q.shape[2]} heads of q, got {k.shape[2]}")


def _check_options(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float | None,
    softcap: float | None,
    cu_seqlens: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number > 0 or None, got {softcap!r}")
    if sinks is not None:
        check_float("sinks", sinks)
        check_shape("sinks", sinks, (q.shape[2],), "[Hq], one per query head")
        check_same_device(q=q, sinks=sinks)
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens must have shape [n + 1] with n >= 0 sequences, got {tuple(cu_seqlens.shape)}")
        if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"cu_seqlens needs one packed row, q [1, S, Hq, D] and k [1, S, Hkv, D], got q {tuple(q.shape)} and k "
                f"{tuple(k.shape)}"
            )
        check_same_device(q=q, cu_seqlens=cu_seqlens)


def _window(window: int | None) -> int:
    """As the op takes it, 0 for none. Whatever stands for "no limit" becomes a number to which a position can be added
    in int32 (a constant: the smaller of it and a sequence length would tie a compiled graph to that length)."""
    return 0 if window is None else min(check_int("window", window, 1), INT32_SAFE)


def _check_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if cos is None or sin is None:
        raise ValueError(f"cos and sin must be given together, got only {'sin' if cos is None else 'cos'}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        registry.refuse_derivative(name, table, "the angles are constants of the op")
    check_same_device(q=q, cos=cos, sin=sin)
    rows = max(q.shape[1], k.shape[1])
    shapes = ((rows,), (q.shape[0], rows))
    if cos.dim() not in (2, 3) or tuple(cos.shape[:-1]) not in shapes or not 2 <= 2 * cos.shape[-1] <= q.shape[-1]:
        raise ValueError(
            f"cos must have shape [{rows}, R] or [{q.shape[0]}, {rows}, R] (max(Sq, Sk) rows) with "
            f"2 <= 2R <= D = {q.shape[-1]}, got {tuple(cos.shape)}"
        )
    check_shape("sin", sin, tuple(cos.shape), "the shape of cos")
    return cos, sin


def _check_raw(q: torch.Tensor, k: torch.Tensor, _v: torch.Tensor, *options_and_keep: Any) -> None:
    """Of a launcher, beside the shapes of single tensors."""
    o = reference.Options(*options_and_keep[:9])
    _check_heads(q, k, k)
    _check_options(q, k, o.scale, o.softcap or None, o.cu_seqlens, o.sinks)
    check_int("window", o.window, 0)
    if o.cos is not None or o.sin is not None:
        _check_rotary(q, k, o.cos, o.sin)


def _check_raw_backward(_grad_out: Any, _grad_lse: Any, q: torch.Tensor, *others: Any) -> None:
    k, v, _, lse, rest, *options = others
    _check_raw(q, k, v, *options)
    check_shape("rest", rest, tuple((q if reference.is_half(q.dtype) else lse).shape), "as the forward gave it")


def _fake_forward(q: torch.Tensor, k: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del k
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse, reference.empty_rest(q, lse, others[-1])


def _fake_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rest: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad_out, grad_lse, out, lse, rest
    sinks = reference.Options(*options).sinks
    grad_sinks = q.new_empty(0, dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, cos, sin, cu_seqlens, sinks, *ctx.options, ctx.keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cos, sin, cu_seqlens, sinks)


def _backward(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, _grad_rest: None
) -> tuple[torch.Tensor | None, ...]:
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    if not ctx.keep:
        raise RuntimeError("astrobiogen::attention was called with keep=False, so it has no gradient")
    saved = ctx.saved_tensors  # read once: checkpointing frees them at the first access
    grad_q, grad_k, grad_v, grad_sinks = torch.ops.astrobiogen.attention_backward(
        grad_out, grad_lse, *saved, *ctx.options
    )
    return grad_q, grad_k, grad_v, None, None, None, None if saved[-1] is None else grad_sinks, *((None,) * 6)


_OPTIONS = (
    "Tensor? cos, Tensor? sin, Tensor? cu_seqlens, Tensor? sinks, "
    "bool causal, float scale, int window, float softcap, bool interleaved"
)
_OPERANDS = (
    "q: float B Sq Hq D; k: q B Sk Hkv D; v: q B Sk Hkv D; cos: any *table R; sin: any *table R; "
    "cu_seqlens: index bounds; sinks: any Hq"
)
registry.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
    operands=_OPERANDS,
    also=_check_raw,
    reference=reference.attention_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:attention",
)
registry.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor rest, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    operands=f"{_OPERANDS}; grad_out: q B Sq Hq D; grad_lse: exact B Hq Sq; out: q B Sq Hq D; lse: exact B Hq Sq; "
    "rest: rest *rest",
    also=_check_raw_backward,
    reference=reference.attention_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:attention_backward",
)
registry.differentiable("attention", backward=_backward, setup_context=_setup)
registry.refuse_second_derivative("attention_backward")
