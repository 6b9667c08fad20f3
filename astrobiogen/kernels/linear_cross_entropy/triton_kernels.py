"""Linear layer + cross-entropy on NVIDIA GPUs, forward and backward. Formulas: `reference.py`; counts: `README.md`.

The GEMMs are cuBLAS calls on slabs of the vocabulary, all tokens at once, into one reused buffer [tokens, slab columns]
in the dtype of x; two Triton kernels do the rest. `_statistics_kernel` folds a slab into the running log-sum-exp of
each token; `_slope_kernel` turns a recomputed slab into the gradient of the logits in place. The vocabulary, not the
tokens, is cut: each slab of the weight gradient is then one GEMM over all tokens, accumulated in fp32 registers and
written once, where token chunks would read and write a [V, H] buffer per chunk. Nothing is atomic, and each token's
slabs are folded in order, so a repeated run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from astrobiogen.kernels.cases import CompileCase
from astrobiogen.kernels.linear_cross_entropy import reference
from astrobiogen.kernels.triton_launch import launch

# Logits per slab: in half precision they stay in the L2 of an H100-class GPU between the GEMM and our kernel. An RTX
# A5000 streams them, at a small part of the GEMMs' time (the op's notes).
SLAB_ELEMENTS = 2**24
# Narrowest slab, however many tokens: the fp32 sum of dx is read and written once per slab, 8 bytes per element against
# 2 x 2048 flops.
MIN_COLUMNS = 2048
# Columns are a multiple of 64, so that every row of a slab starts on a 128-byte line whatever the vocabulary (50257 has
# odd rows in eager).
COLUMN_MULTIPLE = 64
# Columns a program handles at once: 2048 logits over 4 warps are 16 per thread, two 16-byte loads in half precision. A
# slab of MIN_COLUMNS leaves no lane idle.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def _tanh(x):
    """tanh to fp32 accuracy, also near 0, where 1 - 2 / (e^2x + 1) cancels: an odd polynomial below 0.55 (relative
    error 1e-9).
    """
    a = tl.abs(x)
    a = tl.where(a > 20.0, 20.0, a)  # tanh is 1 from 9.1 on; written so that NaN passes
    z = a * a
    p = z * -6.27423869e-3 + 2.10716780e-2
    p = p * z - 5.38523085e-2
    p = p * z + 1.33325860e-1
    p = p * z - 3.33333164e-1
    magnitude = tl.where(a < 0.55, a + a * (z * p), 1.0 - 2.0 / (tl.exp(a + a) + 1.0))
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit(do_not_specialize=["tokens", "first", "columns", "vocabulary", "ignore_index"])
def _statistics_kernel(
    logits_ptr,  # [tokens, row_stride]: one slab, its first `columns` columns valid
    target_ptr,
    running_ptr,  # fp64 [4, tokens]: maximum, sum of exp(z - maximum), sum of z, logit of the target
    loss_ptr,
    lse_ptr,  # fp64
    tokens,
    row_stride,
    first,  # vocabulary index of column 0
    columns,
    padded,  # columns rounded up to COLUMN_MULTIPLE: a memory mask that 16-byte loads can keep
    vocabulary,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_CAP: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token per program: fold one slab into its running sums; after the last slab, its loss.

    What all logits have in common is taken off before they are added up, and kept apart, in fp64, from their
    log-sum-exp: an lse of 1000 in fp32 is off by up to 3e-5, and every probability with it.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    running_ptr += row
    step = tokens.to(tl.int64)
    later = first > 0  # the first slab finds nothing
    maximum = tl.load(running_ptr, mask=later, other=float("-inf")).to(tl.float32)
    sum_exp = tl.load(running_ptr + step, mask=later, other=0.0)
    total = tl.load(running_ptr + 2 * step, mask=later, other=0.0)
    target_logit = tl.load(running_ptr + 3 * step, mask=later, other=0.0)
    offsets = tl.arange(0, BLOCK)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        live = cols < columns
        # Between `columns` and `padded` the buffer holds leftovers, possibly NaN: read, and replaced.
        z = tl.load(logits_ptr + row * row_stride + cols, mask=cols < padded, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = softcap * _tanh(z / softcap)
        z = tl.where(live, z, float("-inf"))
        raised = tl.maximum(maximum, tl.max(z, 0))
        # While all logits are -Inf the shift is 0, so that exp(-Inf) = 0 is added and not NaN.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        sum_exp = sum_exp * tl.exp(maximum - shift).to(tl.float64) + tl.sum(tl.exp(z - shift), 0).to(tl.float64)
        common = shift.to(tl.float64) * tl.minimum(columns - start, BLOCK).to(tl.float64)
        total += tl.sum(tl.where(live, z - shift, 0.0), 0).to(tl.float64) + common
        # The target is compared with each column, never used as an address: out of range, it reads nothing.
        target_logit += tl.sum(tl.where(live & (cols + first == target), z, 0.0), 0).to(tl.float64)
        maximum = raised
    if LAST:
        lse = maximum.to(tl.float64) + tl.log(sum_exp.to(tl.float32)).to(tl.float64)
        loss = (1.0 - label_smoothing) * (lse - target_logit) + label_smoothing * (lse - total / vocabulary)
        loss += z_loss * lse * lse
        tl.store(lse_ptr + row, tl.where(target == ignore_index, 0.0, lse))
        tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss.to(tl.float32)))
    else:
        tl.store(running_ptr, maximum.to(tl.float64))
        tl.store(running_ptr + step, sum_exp)
        tl.store(running_ptr + 2 * step, total)
        tl.store(running_ptr + 3 * step, target_logit)


@triton.jit(do_not_specialize=["first", "columns", "vocabulary", "ignore_index", "grad_stride"])
def _slope_kernel(
    logits_ptr,  # [tokens, row_stride]: one recomputed slab, overwritten by the gradient of its logits
    target_ptr,
    lse_ptr,
    grad_ptr,
    row_stride,
    grad_stride,
    first,
    columns,
    padded,
    vocabulary,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one token per program."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    exact = tl.load(lse_ptr + row)
    lse = exact.to(tl.float32)
    # exp(z - exact) = exp(z - lse) * lost; nothing is lost where lse is not finite.
    lost = tl.where(tl.abs(lse) < float("inf"), tl.exp((lse.to(tl.float64) - exact).to(tl.float32)), 1.0)
    grad = tl.load(grad_ptr + row * grad_stride)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stored = cols < padded
    pointers = logits_ptr + row * row_stride + cols
    # What is read between `columns` and `padded` is replaced; what is written there, nothing reads.
    z = tl.where(cols < columns, tl.load(pointers, mask=stored, other=0.0).to(tl.float32), 0.0)
    derivative = 1.0
    if HAS_CAP:
        ratio = _tanh(z / softcap)
        z = softcap * ratio
        derivative = 1.0 - ratio * ratio
    softmax = tl.exp(tl.where(cols < columns, z - lse, 0.0)) * lost
    slope = (1.0 + 2.0 * z_loss * lse) * softmax - label_smoothing / vocabulary
    slope -= tl.where(cols + first == target, 1.0 - label_smoothing, 0.0)
    # Exactly 0 for an ignored token, also where grad is Inf or NaN (the mean over no token).
    slope = tl.where(target == ignore_index, 0.0, grad * slope * derivative)
    tl.store(pointers, slope.to(logits_ptr.dtype.element_ty), mask=stored)


def slab_columns(tokens: int, vocabulary: int) -> int:
    """Columns per slab; forward and backward use the same, so that recomputed logits have the same bits."""
    wanted = max(MIN_COLUMNS, SLAB_ELEMENTS // max(tokens, 1) // COLUMN_MULTIPLE * COLUMN_MULTIPLE)
    return min(wanted, _padded(vocabulary))


def _padded(columns: int) -> int:
    return triton.cdiv(columns, COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launcher of the op `linear_cross_entropy`: loss [tokens], fp32, and lse [tokens], fp64. fp64 input takes the
    plain reference.
    """
    if x.dtype == torch.float64:
        return reference.linear_cross_entropy_forward(x, weight, target, ignore_index, label_smoothing, z_loss, softcap)
    (tokens, _), vocabulary = x.shape, weight.shape[0]
    reference.check_targets(target, vocabulary, ignore_index)
    loss, lse = (x.new_empty(tokens, dtype=dtype) for dtype in (torch.float32, torch.float64))
    if tokens == 0:
        return loss, lse
    target = target.contiguous()
    running = x.new_empty((4, tokens), dtype=torch.float64)
    columns = slab_columns(tokens, vocabulary)
    buffer = x.new_empty((tokens, columns))
    for first in range(0, vocabulary, columns):
        count = min(columns, vocabulary - first)
        torch.mm(x, weight[first : first + count].t(), out=buffer[:, :count])
        launch(_statistics_kernel, (tokens,))(
            buffer, target, running, loss, lse, tokens, columns, first, count, _padded(count), vocabulary,
            ignore_index, label_smoothing, z_loss, softcap,
            HAS_CAP=softcap > 0.0, LAST=first + count == vocabulary, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss, lse


def linear_cross_entropy_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launcher of the op `linear_cross_entropy_backward`: dx and dweight, or [0] for one that is not needed."""
    if x.dtype == torch.float64:
        return reference.linear_cross_entropy_backward(
            grad, x, weight, target, lse, ignore_index, label_smoothing, z_loss, softcap, need_x, need_weight
        )
    (tokens, hidden), vocabulary = x.shape, weight.shape[0]
    grad_weight = weight.new_empty((vocabulary, hidden) if need_weight else 0)
    if tokens == 0:
        return x.new_empty((0, hidden) if need_x else 0), grad_weight.zero_()
    target, lse, grad = target.contiguous(), lse.contiguous(), grad.to(torch.float32)
    kept = target != ignore_index
    x = reference.only_kept(kept, x)
    columns = slab_columns(tokens, vocabulary)
    buffer = x.new_empty((tokens, columns))
    total_x = x.new_zeros((tokens, hidden) if need_x else 0, dtype=torch.float32)
    for first in range(0, vocabulary, columns):
        count = min(columns, vocabulary - first)
        slab, rows = buffer[:, :count], weight[first : first + count]
        torch.mm(x, rows.t(), out=slab)
        launch(_slope_kernel, (tokens, triton.cdiv(count, BLOCK)))(
            buffer, target, lse, grad, columns, grad.stride(0), first, count, _padded(count), vocabulary,
            ignore_index, label_smoothing, z_loss, softcap,
            HAS_CAP=softcap > 0.0, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        if need_x:
            _accumulate(total_x, slab, rows)
        if need_weight:
            torch.mm(slab.t(), x, out=grad_weight[first : first + count])
    return reference.only_kept(kept, total_x).to(x.dtype) if need_x else total_x.to(x.dtype), grad_weight


# The public function takes them apart on a GPU.
linear_cross_entropy_gradients = reference.compose_gradients(linear_cross_entropy, linear_cross_entropy_backward)


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b in fp32, from operands of any dtype. CPU tensors (Triton's interpreter) lack the mixed-precision
    GEMM of CUDA.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def compile_cases() -> tuple[CompileCase, ...]:
    """Both kernels for the ahead-of-time gate. No size is a compile-time constant: these few serve every vocabulary,
    hidden size and count.
    """
    scalars = dict.fromkeys(("row_stride", "first", "columns", "padded", "vocabulary", "ignore_index"), "i32")
    scalars |= dict.fromkeys(("label_smoothing", "z_loss", "softcap"), "fp32")
    whole = ("row_stride", "padded")
    cases = []
    for dtype in ("fp16", "bf16"):
        logits = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64"}
        statistics = logits | {"running_ptr": "*fp64", "loss_ptr": "*fp32", "lse_ptr": "*fp64"}
        slope = logits | {"lse_ptr": "*fp64", "grad_ptr": "*fp32"}
        for cap, suffix in ((False, dtype), (True, f"{dtype}/softcap")):
            for label, kernel, pointers, integer, flags in (
                ("statistics/a slab", _statistics_kernel, statistics, "tokens", {"LAST": False}),
                ("statistics/last slab", _statistics_kernel, statistics, "tokens", {"LAST": True}),
                ("slope", _slope_kernel, slope, "grad_stride", {}),
            ):
                signature = pointers | {integer: "i32"} | scalars
                constants = {"HAS_CAP": cap, "BLOCK": BLOCK} | flags
                name = f"{label}/{suffix}"
                cases.append(CompileCase(name, kernel, signature, constants, (*pointers, *whole), NUM_WARPS))
    return tuple(cases)
