"""`ops.attention` against its reference: values, gradients, poisoned memory, every dtype, C++ and Triton kernels."""

import dataclasses
import inspect
import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from astrobiogen.kernels import registry
from astrobiogen.kernels.attention import samples
from astrobiogen.kernels.attention.op import attention
from astrobiogen.kernels.cases import Case
from astrobiogen.testing import (
    check_fullgraph,
    check_gradcheck,
    check_nonfinite,
    check_op,
    check_opcheck,
    check_partial_gradients,
    check_second_derivative,
    check_visibility,
    route,
)

OPS = ("attention", "attention_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in samples.CASES if case.gradcheck]
INTERPRETED = [case for case in samples.CASES if case.interpret]
# NumPy has fp16 but no bf16: the interpreter cuts fp32 off instead of rounding it, so bf16 accuracy is judged on a
# GPU and by the C++ kernels.
INTERPRETED_HALF = {"gradcheck", "everything", "packed_window"}
MASKS = [case for case in samples.CASES if case.masks]
# Few rows have kernels of their own where no gradient is wanted.
WITHOUT_GRADIENTS = [*(dataclasses.replace(case, differentiable=()) for case in samples.CASES), *samples.FEW]


def reference(*tensors: torch.Tensor, **options: Any) -> Any:
    """The public function under `use_kernels("reference")`: plain PyTorch and autograd."""
    with registry.use_kernels("reference"):
        return attention(*tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", samples.CASES, ids=lambda case: case.name)
def test_cpu(case: Case, dtype: torch.dtype) -> None:
    check_op(attention, reference, case, dtype, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WITHOUT_GRADIENTS, ids=lambda case: case.name)
def test_cpu_without_gradients(case: Case, dtype: torch.dtype) -> None:
    check_op(attention, reference, case, dtype, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("case", [case for case in WITHOUT_GRADIENTS if case.masks], ids=lambda case: case.name)
def test_visibility_without_gradients(case: Case) -> None:
    check_visibility(attention, reference, case, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", samples.PEAKED, ids=lambda case: case.name)
def test_gradients_of_a_peaked_softmax(case: Case, dtype: torch.dtype) -> None:
    for seed in range(4):
        check_op(attention, reference, case, dtype, ops=OPS, implementation="cpu", seed=seed)


def test_gradients_of_a_peaked_softmax_in_triton() -> None:
    case = next(case for case in samples.PEAKED if case.name == "peaked_few")
    check_op(attention, reference, case, torch.float16, ops=OPS, implementation="triton")


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("queries", [5, 40])
def test_probabilities_sum_up_to_one_whatever_the_log_sum_exp_is_rounded_to(
    implementation: Literal["cpu", "triton"], queries: int
) -> None:
    """With scores that are exact in fp32, in units of log 2: what is left of the error of dV is the sums' rounding."""
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-20, 21, (1, n, 2, 16), generator=generator).to(device).float() for n in (queries, 40))
    v, grad = (torch.randn(1, n, 2, 16, generator=generator).to(device) for n in (40, queries))
    v.requires_grad_()
    scale = 0.25 * math.log(2)
    with route(OPS, implementation):
        out, lse = attention(q, k, v, scale=scale, return_lse=True)
        (found,) = torch.autograd.grad(out, v, grad)
    wide = v.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(q.double(), k.double(), wide, scale=scale), wide, grad.double())
    eps = torch.finfo(torch.float32).eps
    assert lse.max() > 200  # half a unit in its last place is 64 eps
    assert (found - exact).abs().max() <= 8 * eps * exact.abs().max()


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_triton(case: Case) -> None:
    dtypes = (
        DTYPES if torch.cuda.is_available() else (torch.float16,) if case.name in INTERPRETED_HALF else (torch.float32,)
    )
    for dtype in dtypes:
        check_op(attention, reference, case, dtype, ops=OPS, implementation="triton")


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_what_is_masked_cannot_be_heard(case: Case) -> None:
    check_visibility(reference, reference, case)
    check_visibility(attention, reference, case, ops=OPS, implementation="cpu")
    if case.interpret:
        check_visibility(attention, reference, case, torch.float16, ops=OPS, implementation="triton")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contracts(case: Case) -> None:
    check_nonfinite(attention, reference, case, ops=OPS, implementation="cpu")
    check_opcheck(attention, case)
    check_fullgraph(attention, case)
    check_gradcheck(reference, case)
    check_gradcheck(attention, case)
    check_second_derivative(attention, case)
    check_partial_gradients(attention, case)


@pytest.mark.parametrize("dim", samples.HEAD_DIMS)
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_head_dimensions(dim: int, rotary: bool) -> None:
    options = {"rotary": max(1, dim // 2)} if rotary else {}
    case = Case(f"dim_{dim}", samples.plain(1, 67, 67, 2, 1, dim, **options), ("q", "k", "v"))
    check_op(attention, reference, case, torch.float32, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("group", [1, 4, 8, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_groups(group: int, causal: bool) -> None:
    case = Case(
        f"group_{group}", samples.plain(1, 33, 70, 2 * group, 2, 20, causal=causal, return_lse=True), ("q", "k", "v")
    )
    check_op(attention, reference, case, torch.float32, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_visible_key(dtype: torch.dtype) -> None:
    """The softmax is 1 whatever q and k are: their gradients are the rounding of the dot products dO·O and dO·v."""
    q, k, v, grad = (torch.randn(1, 9, 2, 68, dtype=dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(attention(*leaves, window=1), leaves, grad)
    torch.testing.assert_close(grads[2], grad, rtol=2 * torch.finfo(torch.float32).eps, atol=0.0)
    rounding = 8 * torch.finfo(torch.float32).eps * (grad.double().norm(dim=-1) * v.double().norm(dim=-1)).max()
    for found, other in zip(grads[:2], (k, q)):
        assert found.abs().max() <= rounding * other.abs().max() * 68**-0.5


@pytest.mark.parametrize("queries", [1, 17, 127, 128, 129, 513])
@pytest.mark.parametrize("keys", [None, 200])
def test_lengths(queries: int, keys: int | None) -> None:
    alone = (keys or queries) == 1  # a softmax of one: the gradients of q and k are rounding, `test_one_visible_key`
    names = ("v",) if alone else ("q", "k", "v")
    case = Case(f"length_{queries}_{keys}", samples.plain(1, queries, keys or queries, 2, 1, 68, rotary=34), names)
    check_op(attention, reference, case, torch.float32, ops=OPS, implementation="cpu")


@pytest.mark.parametrize("causal", [True, False])
def test_equals_sdpa_math_in_fp64(causal: bool) -> None:
    q, k, v = (torch.randn(2, 37, heads, 68, dtype=torch.float64, requires_grad=True) for heads in (8, 2, 2))
    upstream = torch.randn(2, 37, 8, 68, dtype=torch.float64)
    got = attention(q, k, v, causal=causal)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    pairs = zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_autocast_casts_queries_keys_values_only() -> None:
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    angle = torch.randn(9, 8)
    cos, sin = angle.cos(), angle.sin()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(q, k, v, cos=cos, sin=sin)
        wide = attention(q.double(), k.double(), v.double())
    assert got.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(got, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cos=cos, sin=sin))
    grads = torch.autograd.grad(got.float().square().sum(), (q, k, v))
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in grads)


def test_checkpointing_gives_the_same_bits() -> None:
    q, k, v = (torch.randn(1, 40, heads, 68, requires_grad=True) for heads in (4, 2, 2))
    plain, kept = attention(q, k, v), checkpoint(attention, q, k, v, use_reentrant=False)
    upstream = torch.randn_like(plain)
    assert torch.equal(plain, kept)
    for mine, theirs in zip(
        torch.autograd.grad(plain, (q, k, v), upstream), torch.autograd.grad(kept, (q, k, v), upstream)
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_thread_count_gives_the_same_bits_of_few_queries(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, n, heads, 64).to(dtype) for n, heads in ((2, 8), (1500, 2), (1500, 2)))

    def run(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return attention(q, k, v)

    assert torch.equal(run(1), run(3))


def test_any_thread_count_gives_the_same_bits() -> None:
    q, k, v = (torch.randn(1, 150, heads, 68, requires_grad=True) for heads in (8, 2, 2))
    upstream = torch.randn_like(q)

    def run(threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        out = attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    for one, three in zip(run(1), run(3)):
        assert torch.equal(one, three)


def _good() -> dict[str, Any]:
    return {"q": torch.randn(1, 4, 4, 8), "k": torch.randn(1, 4, 2, 8), "v": torch.randn(1, 4, 2, 8)}


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A bad argument and what the message must say."""

    change: dict[str, Any]
    error: type[Exception]
    message: str


WRONG = {
    "list": Wrong({"q": [1.0]}, TypeError, r"q must be a torch.Tensor, got list"),
    "integer": Wrong(
        {"k": torch.ones(1, 4, 2, 8, dtype=torch.int64)}, TypeError, r"k must be float32, .* got torch.int64"
    ),
    "mixed": Wrong(
        {"v": torch.randn(1, 4, 2, 8).half()},
        TypeError,
        r"v must have the dtype of q, torch.float32, got torch.float16",
    ),
    "rank": Wrong({"q": torch.randn(4, 4, 8)}, ValueError, r"q must have shape \[B, Sq, Hq, D\] .* got \(4, 4, 8\)"),
    "too_wide": Wrong({"q": torch.randn(1, 4, 4, 257)}, ValueError, r"q must have .* D <= 256, got \(1, 4, 4, 257\)"),
    "key_dim": Wrong(
        {"k": torch.randn(1, 4, 2, 9)}, ValueError, r"k must have shape \[1, Sk, Hkv, 8\] .* got \(1, 4, 2, 9\)"
    ),
    "value": Wrong(
        {"v": torch.randn(1, 5, 2, 8)}, ValueError, r"v must have shape \(1, 4, 2, 8\) .* got \(1, 5, 2, 8\)"
    ),
    "group": Wrong({"q": torch.randn(1, 4, 3, 8)}, ValueError, r"divides the 3 heads of q, got 2"),
    "cos_alone": Wrong({"cos": torch.ones(4, 4)}, ValueError, r"cos and sin must be given together, got only cos"),
    "cos_shape": Wrong(
        {"cos": torch.ones(3, 4), "sin": torch.ones(3, 4)}, ValueError, r"cos must have shape \[4, R\] .* got \(3, 4\)"
    ),
    "cos_wide": Wrong(
        {"cos": torch.ones(4, 5), "sin": torch.ones(4, 5)}, ValueError, r"2 <= 2R <= D = 8, got \(4, 5\)"
    ),
    "sin_shape": Wrong({"cos": torch.ones(4, 4), "sin": torch.ones(4, 3)}, ValueError, r"sin must have shape \(4, 4\)"),
    "scale": Wrong({"scale": float("nan")}, ValueError, r"scale must be a finite number or None, got nan"),
    "window": Wrong({"window": 0}, ValueError, r"window must be an integer >= 1, got 0"),
    "window_sign": Wrong({"window": -1}, ValueError, r"window must be an integer >= 1, got -1"),
    "softcap": Wrong({"softcap": -1.0}, ValueError, r"softcap must be a finite number > 0 or None, got -1.0"),
    "sinks": Wrong({"sinks": torch.ones(2)}, ValueError, r"sinks must have shape \(4,\) .* got \(2,\)"),
    "cu_float": Wrong(
        {"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, r"cu_seqlens must be int32 or int64, got torch.float32"
    ),
    "cu_rank": Wrong(
        {"cu_seqlens": torch.tensor([[0, 4]])}, ValueError, r"cu_seqlens must have shape \[n \+ 1\] .* got \(1, 2\)"
    ),
    "cu_order": Wrong(
        {"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, r"cu_seqlens must not decrease, got 3 before 2"
    ),
    "cu_beyond": Wrong(
        {"cu_seqlens": torch.tensor([0, 2**62, 4])},
        ValueError,
        r"cu_seqlens must not decrease, got 4611686018427387904 before 4",
    ),
    "cu_negative": Wrong(
        {"cu_seqlens": torch.tensor([0, -(2**40), 4])}, ValueError, r"cu_seqlens must not decrease, got 0 before -"
    ),
    "cu_end": Wrong(
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        r"cu_seqlens must start at 0 and end at most at S = 4, got 0 .. 5",
    ),
    "cu_batch": Wrong(
        {name: torch.randn(2, 4, 2, 8) for name in "qkv"} | {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        r"cu_seqlens needs one packed row",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    wrong = WRONG[name]
    with pytest.raises(wrong.error, match=wrong.message):
        attention(**{**_good(), **wrong.change})


def test_dropout_is_not_offered() -> None:
    assert "dropout" not in inspect.signature(attention).parameters
    with pytest.raises(TypeError, match="dropout"):
        attention(**_good(), dropout_p=0.1)
