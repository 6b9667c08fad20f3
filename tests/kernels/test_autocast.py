"""Under `torch.autocast` every op does what PyTorch's functions in its place do: result types, values, gradients.

PyTorch's policies differ between devices. Those of a GPU are asked of fake CUDA tensors, which go through the same
dispatcher and need no GPU; they have types and no values.
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import astrobiogen
from astrobiogen import layers, ops
from astrobiogen.kernels import registry

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An op, and PyTorch's functions in its place. `shapes` by argument name; `together`: arguments that take another
    one's dtype, so that the table stays small; `strict`: float64 beside another dtype is an error for both."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    together: dict[str, str] = dataclasses.field(default_factory=dict)
    strict: bool = False

    def combinations(self) -> Iterator[dict[str, torch.dtype]]:
        """The dtypes of the arguments, all combinations."""
        free = [name for name in self.shapes if name not in self.together]
        for chosen in itertools.product(TYPES, repeat=len(free)):
            types = dict(zip(free, chosen))
            yield types | {name: types[other] for name, other in self.together.items()}


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A rotation as Llama's code has it: in fp32, back in the dtype of its input."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, -1)
    cos, sin = (table.detach().to(wide).unsqueeze(1) for table in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


def normed(x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor) -> torch.Tensor:
    z = F.conv2d(x, weight).movedim(1, -1)
    return F.silu(F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias).movedim(-1, 1))


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


RECEIVER, SENDER = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 0, 2, 2, 0])

EDGES = ops.edge_lists(RECEIVER, SENDER, 3)


def along_edges(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Attention over all pairs of nodes, masked to the edges."""
    nowhere = bias.new_full((3, 3, q.shape[1]), -torch.inf)
    mask = nowhere.index_put((RECEIVER.to(q.device), SENDER.to(q.device)), bias).permute(2, 0, 1)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1)


def our_edges(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return ops.edge_attention(q, k, v, bias, ops.EdgeLists(*(index.to(q.device) for index in EDGES)))


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0], device=x.device) % 3


HEADS = dict.fromkeys("qkv", (1, 5, 2, 4))
NODES = dict.fromkeys("qkv", (3, 2, 4)) | {"bias": (5, 2)}
IMAGE, KERNEL = {"x": (1, 2, 5, 4)}, {"weight": (3, 2, 2, 2)}
PAIRS: dict[str, Pair] = {
    "rms_norm": Pair(
        ops.rms_norm, lambda x, weight: F.rms_norm(x, (8,), weight, 1e-6), {"x": (3, 8), "weight": (8,)}
    ),
    "add_rms_norm": Pair(
        lambda x, residual, weight: ops.add_rms_norm(x, residual, weight),
        lambda x, residual, weight: (F.rms_norm(x + residual, (8,), weight, 1e-6), x + residual),
        {"x": (3, 8), "residual": (3, 8), "weight": (8,)},
    ),
    "swiglu": Pair(ops.swiglu, lambda gate, up: F.silu(gate) * up, {"gate": (3, 8), "up": (3, 8)}),
    "swiglu_packed": Pair(
        ops.swiglu_packed, lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1], {"gate_up": (3, 8)}
    ),
    "linear": Pair(ops.linear, F.linear, {"x": (3, 8), "weight": (5, 8), "bias": (5,)}, strict=True),
    "swiglu_mlp": Pair(
        lambda x, gate, up, down: ops.swiglu_mlp(x, gate, up, down),
        lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        {"x": (3, 8), "gate": (5, 8), "up": (5, 8), "down": (8, 5)},
        together={"up": "gate"},
        strict=True,
    ),
    "rope": Pair(ops.rope, turned, {"x": (1, 5, 2, 8), "cos": (5, 4), "sin": (5, 4)}),
    "attention": Pair(ops.attention, attended, HEADS, strict=True),
    "edge_attention": Pair(our_edges, along_edges, NODES, together={"v": "k"}, strict=True),
    "conv_nd": Pair(
        ops.conv_nd, F.conv2d, IMAGE | KERNEL | {"bias": (3,)}, strict=True
    ),
    "conv_nd silu": Pair(
        lambda x, weight: ops.conv_nd(x, weight, activation="silu"),
        lambda x, weight: F.silu(F.conv2d(x, weight)),
        IMAGE | KERNEL,
        strict=True,
    ),
    "conv_transpose_nd": Pair(
        ops.conv_transpose_nd, F.conv_transpose2d, {"x": (1, 3, 4, 3)} | KERNEL | {"bias": (2,)}, strict=True
    ),
    "conv_nd_norm": Pair(
        lambda x, weight, norm_weight, norm_bias: ops.conv_nd_norm(
            x, weight, None, norm_weight, norm_bias, norm="layer", activation="silu"
        ),
        normed,
        IMAGE | {"weight": (8, 2, 2, 2), "norm_weight": (8,), "norm_bias": (8,)},
        together={"norm_bias": "norm_weight"},
    ),
    "linear_cross_entropy": Pair(
        lambda x, weight: ops.linear_cross_entropy(x, weight, targets(x)),
        lambda x, weight: F.cross_entropy(F.linear(x, weight), targets(x)),
        {"x": (4, 8), "weight": (5, 8)},
        strict=True,
    ),
}  # fmt: skip


@contextlib.contextmanager
def autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast`, also for CUDA where there is none: for fake tensors."""
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, dtype)
    torch.autocast_increment_nesting()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # F.rms_norm's advice
            yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


def attempt(function: Callable[..., Any], tensors: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, ...] | None:
    """The results under autocast of the tensors' device, None for an error."""
    with autocast(next(iter(tensors.values())).device.type, dtype):
        try:
            out = function(*tensors.values())
        except (RuntimeError, TypeError):
            return None
    return out if isinstance(out, tuple) else (out,)


def leaves(drawn: Tensors, types: dict[str, torch.dtype]) -> Tensors:
    """Fresh leaves; tables of cos and sin are constants."""
    tensors = {name: value.to(types[name], copy=True) for name, value in drawn.items()}
    return {name: t if name in ("cos", "sin") else t.requires_grad_() for name, t in tensors.items()}


def assert_close_to(got: torch.Tensor, wanted: torch.Tensor, eps: float, label: str) -> None:
    """Both chains round the same operands; then each rounds a handful of intermediate results."""
    assert got.dtype == wanted.dtype, f"{label}: {got.dtype} instead of {wanted.dtype}"
    got, wanted = got.detach().double(), wanted.detach().double()
    error, limit = float((got - wanted).abs().max()), 4 * eps * max(1.0, float(wanted.abs().max()))
    assert error <= limit, f"{label}: off by {error:.3g}, allowed {limit:.3g}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_on_the_cpu_every_combination_of_types_gives_what_pytorch_gives(name: str, dtype: torch.dtype) -> None:
    pair = PAIRS[name]
    drawn = {argument: torch.randn(shape, dtype=torch.float64) for argument, shape in pair.shapes.items()}
    compared = 0
    for types in pair.combinations():
        mine, theirs = leaves(drawn, types), leaves(drawn, types)
        label = f"{name} {list(types.values())} under {dtype}"
        got, wanted = attempt(pair.ours, mine, dtype), attempt(pair.theirs, theirs, dtype)
        if wanted is None:
            assert got is None or not pair.strict, f"{label}: PyTorch refuses it"
            continue
        if got is None:  # PyTorch adds a bias of any type to a transposed convolution
            assert pair.strict, f"{label}: refused"
            assert torch.float64 in types.values(), f"{label}: refused"
            continue
        eps = max(torch.finfo(one).eps for one in (*types.values(), *(value.dtype for value in wanted)))
        if any(one != torch.float64 for one in types.values()) and pair.strict:
            eps = max(eps, torch.finfo(dtype).eps)
        for number, (one, other) in enumerate(zip(got, wanted)):
            assert_close_to(one, other, eps, f"{label}, result {number}")
        cotangents = [torch.ones_like(value) for value in wanted]
        torch.autograd.backward(got, cotangents)
        torch.autograd.backward(wanted, cotangents)
        for argument, leaf in mine.items():
            if leaf.requires_grad:
                one, other = leaf.grad, theirs[argument].grad
                assert one is not None
                assert other is not None
                assert_close_to(one, other, 2 * eps, f"{label}, gradient of {argument}")
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", PAIRS)
def test_on_a_gpu_every_combination_of_types_gives_the_type_that_pytorch_gives(name: str) -> None:
    pair, dtype = PAIRS[name], torch.bfloat16
    compared = 0
    for types in pair.combinations():
        mixed = torch.float64 in types.values() and set(types.values()) != {torch.float64}
        if pair.strict and mixed:
            continue  # an error of the product, which a fake tensor does not compute
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes = pair.shapes.items()
            tensors = {argument: torch.ones(shape, dtype=types[argument], device="cuda") for argument, shape in shapes}
            got, wanted = attempt(pair.ours, tensors, dtype), attempt(pair.theirs, tensors, dtype)
        label = f"{name} {list(types.values())} under {dtype}"
        if wanted is None or (got is None and mixed):
            continue
        assert got is not None, f"{label}: refused"
        assert [value.dtype for value in got] == [value.dtype for value in wanted], label
        compared += 1
    assert compared >= 4


def arguments(pair: Pair, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in pair.shapes.values()]


@pytest.mark.parametrize("name", PAIRS)
def test_autocast_switched_off_inside_autocast_changes_nothing(name: str) -> None:
    tensors = arguments(PAIRS[name])
    plain = PAIRS[name].ours(*tensors)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        nested = PAIRS[name].ours(*tensors)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        uncached = PAIRS[name].ours(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cached = [PAIRS[name].ours(*tensors) for _ in range(2)][1]
    for one, other in ((plain, nested), (uncached, cached)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_the_references_follow_the_same_rule(name: str, dtype: torch.dtype) -> None:
    """Also inputs in the other half precision, which PyTorch's `cat` refuses under autocast of a CPU."""
    for given in TYPES:
        tensors = arguments(PAIRS[name], given)
        with torch.autocast("cpu", dtype):
            ours = PAIRS[name].ours(*tensors)
            with astrobiogen.use_kernels("reference"):
                plain = PAIRS[name].ours(*tensors)
        eps = 4 * max(torch.finfo(one).eps for one in (dtype if given != torch.float64 else given, given))
        for one, other in zip(*(out if isinstance(out, tuple) else (out,) for out in (ours, plain))):
            assert_close_to(one, other, eps, f"{name} {given}")


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_scores_of_attention_stay_in_fp32(mode: Any) -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 8).bfloat16()
    with astrobiogen.use_kernels(mode):
        plain = ops.attention(q, k, v, return_lse=True)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_backward_pass_inside_the_block_is_the_one_outside(name: str) -> None:
    """Autocast is off inside an op: it would round the fp32 products of a backward kernel."""
    tensors = [
        t if argument in ("cos", "sin") else t.requires_grad_()
        for argument, t in zip(PAIRS[name].shapes, arguments(PAIRS[name]))
    ]
    out = PAIRS[name].ours(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    leaves, cotangents = [t for t in tensors if t.requires_grad], [torch.randn_like(value) for value in out]
    plain = torch.autograd.grad(out, leaves, cotangents, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, leaves, cotangents, retain_graph=True)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


def chain(x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Ops of each policy, one behind the other."""
    y, total = ops.add_rms_norm(ops.linear(x, weight), x, norm)
    y = ops.swiglu(ops.swiglu_mlp(y, weight, weight, weight), total)
    heads = y.view(1, 4, 2, 4)
    heads = ops.rope(ops.attention(heads, heads, heads), *ops.rope_frequencies(4, 4))
    image = ops.conv_nd(heads.reshape(1, 4, 8), weight[:4, :4, None], activation="silu")
    return ops.linear_cross_entropy(image.reshape(4, 8), weight, targets(x)) + ops.rms_norm(image.mT, norm[:4]).sum()


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_without_a_graph_break(inside: bool) -> None:
    x, weight, norm = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8)

    def under_autocast(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return chain(*tensors)

    with registry.only_ops():  # as compiled: PyTorch's convolution rounds elsewhere
        expected = under_autocast(x, weight, norm)
    torch._dynamo.reset()
    if inside:
        got = torch.compile(under_autocast, fullgraph=True, backend="aot_eager")(x, weight, norm)
    else:
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            got = compiled(x, weight, norm)
    torch.testing.assert_close(got, expected)


def test_layers_take_autocast_from_the_ops() -> None:
    x = torch.randn(2, 3, 8)
    modules: list[tuple[Any, torch.Tensor]] = [
        (layers.ConvNd(1, 3, 4, 3), x), (layers.ConvNormAct(1, 3, 4, 3), x), (layers.SwiGLU(8, 16), x),
        (layers.SwiGLU(8, 16, recompute=True), x), (layers.Linear(8, 4), x), (layers.GroupedQueryAttention(8, 2), x),
    ]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        for module, given in modules:
            out = module(given)
            assert out.dtype == torch.bfloat16, type(module).__name__
            out.sum().backward()
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())
