"""What every layer must survive: other people's ways of making, moving, saving and filling modules."""

import copy
import dataclasses
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from astrobiogen import layers


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: how to make it (`place` holds device and dtype), what it takes, and the modules that it replaces."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    eager: Callable[[], nn.Module] | None = None  # with the same state dict


class EagerSwiGLU(nn.Module):
    """Hugging Face Llama's MLP."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(12, 20, bias), nn.Linear(12, 20, bias)
        self.down_proj = nn.Linear(20, 12, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagerLoss(nn.Linear):
    """The pair that LinearCrossEntropy replaces."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        return F.cross_entropy(super().forward(input), target)


class EagerRotary(nn.Module):
    """Frequencies as a formula."""

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None] * (10_000.0 ** -(torch.arange(0, 8, 2) / 8))
        return angles.cos(), angles.sin()


class EagerBlock(nn.Module):
    """Convolution, group norm, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(self.conv(x)))


def rows_of(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def block(norm: Any, **options: Any) -> Callable[..., nn.Module]:
    return lambda **place: layers.ConvNormAct(2, 3, 8, 3, norm, padding=1, **options, **place)


# Every name of layers.__all__ must begin a row, or say why it has none.
ROWS: dict[str, Row] = {
    "Linear": Row(lambda **p: layers.Linear(12, 5, **p), rows_of(3, 12), lambda: nn.Linear(12, 5)),
    "RMSNorm": Row(lambda **p: layers.RMSNorm(12, **p), rows_of(3, 12), lambda: nn.RMSNorm(12, eps=1e-6)),
    "RMSNorm/no-eps": Row(lambda **p: layers.RMSNorm(12, None, **p), rows_of(3, 12), lambda: nn.RMSNorm(12)),
    "RMSNorm/axes": Row(
        lambda **p: layers.RMSNorm((3, 4), None, **p), rows_of(5, 3, 4), lambda: nn.RMSNorm((3, 4))
    ),
    "RMSNorm/no-weight": Row(
        lambda **p: layers.RMSNorm(12, None, False, **p), rows_of(3, 12), lambda: nn.RMSNorm(12, None, False)
    ),
    "SwiGLU": Row(lambda **p: layers.SwiGLU(12, 20, **p), rows_of(3, 12), lambda: EagerSwiGLU(False)),
    "SwiGLU/padded": Row(
        lambda **p: layers.SwiGLU(12, 20, True, True, **p), rows_of(3, 12), lambda: EagerSwiGLU(True)
    ),
    "SwiGLU/recompute": Row(
        lambda **p: layers.SwiGLU(12, 20, False, True, True, **p), rows_of(3, 12), lambda: EagerSwiGLU(False)
    ),
    "RotaryEmbedding": Row(
        lambda **p: layers.RotaryEmbedding(8).to(**p), lambda: (torch.arange(900, 909),), EagerRotary
    ),
    "GroupedQueryAttention": Row(lambda **p: layers.GroupedQueryAttention(12, 2, 1, **p), rows_of(1, 4, 12)),
    "LinearCrossEntropy": Row(
        lambda **p: layers.LinearCrossEntropy(12, 31, **p),
        lambda: (torch.randn(6, 12), torch.randint(31, (6,))),
        lambda: EagerLoss(12, 31, bias=False),
    ),
    "LinearCrossEntropy/bias": Row(
        lambda **p: layers.LinearCrossEntropy(12, 31, bias=True, **p),
        lambda: (torch.randn(6, 12), torch.randint(31, (6,))),
        lambda: EagerLoss(12, 31),
    ),
    "ConvNd": Row(
        lambda **p: layers.ConvNd(2, 3, 8, (3, 2), padding="same", **p), rows_of(2, 3, 5, 4),
        lambda: nn.Conv2d(3, 8, (3, 2), padding="same"),
    ),
    "Conv1d": Row(
        lambda **p: layers.Conv1d(3, 8, 3, 1, 1, **p), rows_of(2, 3, 7), lambda: nn.Conv1d(3, 8, 3, 1, 1)
    ),
    "Conv2d": Row(
        lambda **p: layers.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "circular", **p), rows_of(2, 4, 5, 6),
        lambda: nn.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "circular"),
    ),
    "Conv3d": Row(
        lambda **p: layers.Conv3d(2, 8, (1, 2, 3), **p), rows_of(1, 2, 3, 4, 5), lambda: nn.Conv3d(2, 8, (1, 2, 3))
    ),
    "ConvTranspose1d": Row(
        lambda **p: layers.ConvTranspose1d(3, 8, 3, 2, 1, 1, **p), rows_of(2, 3, 7),
        lambda: nn.ConvTranspose1d(3, 8, 3, 2, 1, 1),
    ),
    "ConvTranspose2d": Row(
        lambda **p: layers.ConvTranspose2d(4, 8, 3, 2, 1, 0, 2, False, 2, **p), rows_of(2, 4, 5, 6),
        lambda: nn.ConvTranspose2d(4, 8, 3, 2, 1, 0, 2, False, 2),
    ),
    "ConvTranspose3d": Row(
        lambda **p: layers.ConvTranspose3d(2, 8, (1, 2, 3), **p), rows_of(1, 2, 3, 4, 5),
        lambda: nn.ConvTranspose3d(2, 8, (1, 2, 3)),
    ),
    "ConvTransposeNd": Row(
        lambda **p: layers.ConvTransposeNd(2, 3, 8, 2, 2, **p), rows_of(3, 5, 4), lambda: nn.ConvTranspose2d(3, 8, 2, 2)
    ),
    "ConvTranspose4d": Row(lambda **p: layers.ConvTranspose4d(2, 8, 2, 2, **p), rows_of(1, 2, 2, 3, 2, 2)),
    "ConvTranspose5d": Row(
        lambda **p: layers.ConvTranspose5d(2, 8, (1, 2, 1, 3, 2), **p), rows_of(1, 2, 2, 2, 2, 3, 3)
    ),
    "Conv4d": Row(lambda **p: layers.Conv4d(2, 8, 2, padding="same", **p), rows_of(1, 2, 3, 3, 4, 4)),
    "Conv5d": Row(lambda **p: layers.Conv5d(2, 8, (1, 2, 1, 3, 3), **p), rows_of(1, 2, 2, 3, 2, 4, 4)),
    "ConvNormAct": Row(block("group", norm_groups=2), rows_of(2, 3, 5, 4), EagerBlock),
    "ConvNormAct/layer": Row(block("layer"), rows_of(2, 3, 5, 4)),
    "ConvNormAct/rms": Row(block("rms"), rows_of(2, 3, 5, 4)),
}  # fmt: skip
NO_ROW = {"KeyValueCache": "holds buffers of one generation, and is no module"}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
every_layer = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_layer_has_a_row() -> None:
    assert {name.split("/")[0] for name in ROWS} | set(NO_ROW) == set(layers.__all__)


def assert_equal(layer: nn.Module, other: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(layer(*inputs), other(*inputs), rtol=0, atol=0)


def scrambled(layer: nn.Module) -> nn.Module:
    """Other values everywhere, as after training; what a constructor sets must not come back."""
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.copy_(torch.randn(value.shape))
    return layer


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.eager], ids=[n for n in ROWS if ROWS[n].eager])
def test_values_are_those_of_what_it_replaces(row: Row) -> None:
    assert row.eager is not None
    layer, eager, inputs = row.make(), row.eager(), row.inputs()
    eager.load_state_dict(scrambled(layer).state_dict())
    torch.testing.assert_close(layer(*inputs), eager(*inputs))


@every_layer
def test_made_on_meta_and_initialised_later(row: Row) -> None:
    """Meta, `to_empty`, `reset_parameters` of every module, in the order of `modules()`: the constructor's state."""
    torch.manual_seed(7)
    made = row.make()
    late = row.make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in (*late.parameters(), *late.buffers()):
            value.fill_(torch.nan)
    torch.manual_seed(7)
    for module in late.modules():
        if not list(module.children()) and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    assert_equal(late, made, row.inputs())
    for module in late.modules():
        module.reset_parameters()  # type: ignore[operator]  # every one of ours has it
    assert all(torch.isfinite(value).all() for value in (*late.parameters(), *late.buffers()))
    assert_padding_is_zero(late)


def assert_padding_is_zero(layer: nn.Module) -> None:
    fresh = row_copy(layer)
    fresh.load_state_dict(layer.state_dict())
    for value, again in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(value, again)


def row_copy(layer: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(3.0)
    return fresh


@every_layer
def test_an_initialisation_by_apply(row: Row) -> None:
    def initialise(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    layer = row.make().apply(initialise)
    model = nn.Sequential(row.make())
    model.apply(initialise)
    assert_padding_is_zero(layer)
    assert_padding_is_zero(model[0])


@every_layer
def test_writing_into_the_state_dict_writes_the_layer(row: Row) -> None:
    """As `torch.distributed.checkpoint.load` and averages of weights do."""
    layer, other, inputs = row.make(), scrambled(row.make()), row.inputs()
    state, source = layer.state_dict(), other.state_dict()
    assert list(state) == list(source)
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(source[name])
    assert_equal(layer, other, inputs)
    assert_padding_is_zero(layer)


@every_layer
def test_copies(row: Row) -> None:
    layer, inputs = scrambled(row.make()), row.inputs()
    assert_equal(copy.deepcopy(layer), layer, inputs)
    assert_equal(pickle.loads(pickle.dumps(layer)), layer, inputs)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream)
    for assign in (False, True):
        other = row.make()
        other.load_state_dict(state, assign=assign)
        assert_equal(other, layer, inputs)
    late = row.make(device="meta")
    late.load_state_dict(state, assign=True)
    if not list(late.buffers()):
        assert_equal(late, layer, inputs)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(row: Row, dtype: torch.dtype) -> None:
    """Moved there it is what it is when made there, and gives what its eager counterpart gives there."""
    layer, inputs = row.make(), tuple(t.to(dtype) if t.is_floating_point() else t for t in row.inputs())
    moved, made = copy.deepcopy(layer).to(dtype), row.make(dtype=dtype)
    made.load_state_dict(layer.state_dict())
    assert_equal(moved, made, inputs)
    back = moved.to(torch.float32)
    back.load_state_dict(layer.state_dict())
    assert_equal(back, layer, row.inputs())


def description(values: Any) -> list[Any]:
    return [(v.shape, v.stride(), v.dtype, v.requires_grad) for v in tree_leaves(values)]


def train(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    """Shapes, strides and dtypes of the results and of the parameters' gradients after one step."""
    out = layer(*inputs)
    if any(value.requires_grad for value in tree_leaves(out)):
        out.sum().backward()
    return [description(out), description([parameter.grad for parameter in layer.parameters()])]


@every_layer
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_meta_and_fake_tensors(row: Row, layout: str) -> None:
    inputs = row.inputs()
    if layout == "channels-last":
        inputs = tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t for t in inputs)
    expected = train(row.make(), inputs)
    assert train(row.make(device="meta"), tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs)) == expected
    mode = FakeTensorMode()
    fake = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
    with mode:
        assert train(row.make(), fake) == expected


INTEGERS: dict[str, Callable[[Any], nn.Module]] = {
    "Linear": lambda n: layers.Linear(n(12), n(5)),
    "RMSNorm": lambda n: layers.RMSNorm(n(12)),
    "SwiGLU": lambda n: layers.SwiGLU(n(12), n(20)),
    "RotaryEmbedding": lambda n: layers.RotaryEmbedding(n(8), rotary_dim=n(4)),
    "GroupedQueryAttention": lambda n: layers.GroupedQueryAttention(n(12), n(2), n(1), n(6)),
    "LinearCrossEntropy": lambda n: layers.LinearCrossEntropy(n(12), n(31)),
    "ConvNd": lambda n: layers.ConvNd(n(2), n(4), n(8), n(3), n(1), n(1), n(1), n(2)),
    "Conv4d": lambda n: layers.Conv4d(n(2), n(8), [n(1), n(2), n(1), n(1)], padding=[n(1)] * 4),
    "Conv5d": lambda n: layers.Conv5d(n(2), n(8), n(2)),
    **{f"Conv{axes}d": lambda n, a=axes: getattr(layers, f"Conv{a}d")(n(2), n(8), n(2), n(1)) for axes in (1, 2, 3)},
    **{
        f"ConvTranspose{axes}d": lambda n, a=axes: getattr(layers, f"ConvTranspose{a}d")(n(2), n(8), n(2), n(3), n(1))
        for axes in range(1, 6)
    },
    "ConvTransposeNd": lambda n: layers.ConvTransposeNd(n(2), n(4), n(8), n(3), n(2), n(1), n(1), n(2)),
    "ConvNormAct": lambda n: layers.ConvNormAct(n(2), n(3), n(8), n(3), "group", n(2), padding=n(1)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_numpy(name: str) -> None:
    assert set(INTEGERS) == set(layers.__all__) - set(NO_ROW)
    made = INTEGERS[name](np.int64)
    assert repr(made) == repr(INTEGERS[name](int))
    if name not in ("Linear",):  # PyTorch's own constructor
        for kind, error in ((float, TypeError), (lambda value: -value, ValueError)):
            with pytest.raises((error, ValueError)):
                INTEGERS[name](kind)


# Arguments that the replaced class has and the layer leaves out, with the reason.
REPLACED: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Linear": (nn.Linear, ()),
    "RMSNorm": (nn.RMSNorm, ()),
    **{f"Conv{axes}d": (getattr(nn, f"Conv{min(axes, 3)}d"), ()) for axes in range(1, 6)},
    **{f"ConvTranspose{axes}d": (getattr(nn, f"ConvTranspose{min(axes, 3)}d"), ()) for axes in range(1, 6)},
}


@pytest.mark.parametrize("name", REPLACED)
def test_arguments_are_those_of_what_it_replaces(name: str) -> None:
    """The same names in the same order, positional where the replaced class takes them so."""
    theirs, left_out = REPLACED[name]
    wanted = [argument for argument in inspect.signature(theirs).parameters if argument not in left_out]
    ours = inspect.signature(getattr(layers, name)).parameters
    positional = [n for n in wanted if n not in ("device", "dtype")]
    assert list(ours)[: len(positional)] == positional
    assert {"device", "dtype"} <= set(ours)
    skipped = nn.utils.skip_init(getattr(layers, name), *([4, 4, 3][: 3 if "Conv" in name else 2 - ("RMS" in name)]))
    assert isinstance(skipped, getattr(layers, name))


def test_repr_tells_what_differs_from_the_defaults() -> None:
    plain, other = layers.Conv2d(3, 8, 3), layers.Conv2d(4, 8, 3, padding=1, groups=2, bias=False, activation="silu")
    assert repr(plain) == "Conv2d(2 axes, 3, 8, kernel_size=(3, 3), stride=(1, 1))"
    assert "padding=(1, 1), groups=2, activation=silu, bias=False" in repr(other)
    assert "output_padding=(1, 1)" in repr(layers.ConvTranspose2d(3, 8, 3, 2, 0, 1))
    assert repr(layers.RMSNorm((3, 4), None, False)) == "RMSNorm((3, 4), eps=None, elementwise_affine=False)"
    assert repr(layers.LinearCrossEntropy(4, 5, softcap=30.0)) == "LinearCrossEntropy(4, 5, softcap=30.0)"


def test_eps_of_the_computation() -> None:
    """Not of the weight's dtype: 48 % off in bfloat16 on small values."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = (torch.randn(8, 16, dtype=torch.float64) * 1e-3).to(dtype)
        ours, theirs = layers.RMSNorm(16, None, dtype=dtype), nn.RMSNorm(16, dtype=dtype)
        torch.testing.assert_close(ours(x), theirs(x))
        total = ours(x, x.float())[0] if dtype != torch.float64 else ours(x, x)[0]
        assert torch.isfinite(total).all()


def test_rotary_frequencies_stay_fp32_wherever_they_go() -> None:
    rotary = layers.RotaryEmbedding(64)
    positions = torch.arange(4096)
    expected = rotary(positions)
    model = nn.ModuleList([rotary])
    for move in (
        lambda: model.to(torch.bfloat16), model.half, model.double, lambda: model.to("meta").to_empty(device="cpu"),
        lambda: setattr(rotary, "inverse_frequencies", rotary.inverse_frequencies.bfloat16()),
    ):  # fmt: skip
        move()
        torch.testing.assert_close(rotary(positions), expected, rtol=0, atol=0)
