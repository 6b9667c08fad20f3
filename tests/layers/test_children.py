"""A parent gives what its children give: whatever is hung on a child, put in its place or done to its weight counts."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from astrobiogen.layers import ConvNormAct, GroupedQueryAttention, SwiGLU

Layer = nn.Module


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT's LoRA puts it there."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Quantised(nn.Linear):
    """A linear layer whose weight is held as integers, as bitsandbytes' or torchao's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (nn.Linear's name)
        scale = self.weight.abs().amax(1, keepdim=True) / 7
        return F.linear(input, (self.weight / scale).round() * scale, self.bias)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Marked(torch.Tensor):
    """A tensor subclass that computes in its own way: every `F.linear` or convolution with it is negated."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return -out.as_subclass(torch.Tensor) if func is F.linear else out


def swiglu(**options: Any) -> tuple[SwiGLU, torch.Tensor, str]:
    return SwiGLU(12, 20, **options), torch.randn(5, 12), "up_proj"


def rms() -> tuple[ConvNormAct, torch.Tensor, str]:
    return ConvNormAct(2, 3, 8, 3, padding=1), torch.randn(2, 3, 5, 4), "conv"


def layer_norm() -> tuple[ConvNormAct, torch.Tensor, str]:
    return ConvNormAct(1, 3, 8, 3, norm="layer", activation="gelu"), torch.randn(2, 3, 6), "norm"


def group_norm() -> tuple[ConvNormAct, torch.Tensor, str]:
    return ConvNormAct(1, 3, 8, 3, norm="group", norm_groups=2, activation=None), torch.randn(2, 3, 6), "norm"


def attention() -> tuple[GroupedQueryAttention, torch.Tensor, str]:
    return GroupedQueryAttention(12, 2), torch.randn(1, 4, 12), "v_proj"


MAKERS: dict[str, Callable[[], tuple[Any, torch.Tensor, str]]] = {
    "swiglu": swiglu, "swiglu-gate": lambda: (*swiglu()[:2], "gate_proj"),
    "swiglu-down": lambda: (*swiglu()[:2], "down_proj"), "swiglu-padded": lambda: swiglu(pad_intermediate=True),
    "swiglu-bias": lambda: swiglu(bias=True), "swiglu-recompute": lambda: (*swiglu(recompute=True)[:2], "down_proj"),
    "conv": rms, "conv-rms": lambda: (*rms()[:2], "norm"), "conv-layer": layer_norm, "conv-group": group_norm,
    "attention": attention,
}  # fmt: skip


def called_one_by_one(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What `layer` is defined to be, in terms of calls of its children."""
    if isinstance(layer, SwiGLU):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))
    if isinstance(layer, ConvNormAct):
        z = layer.conv(x)
        normed = layer.norm(z) if layer.kind == "group" else layer.norm(z.movedim(1, -1)).movedim(-1, 1)
        return {"silu": F.silu, "gelu": F.gelu, None: lambda t: t}[layer.activation](normed)
    q, k, v = (p(x).unflatten(-1, (2, 6)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return layer.o_proj(mixed.transpose(1, 2).flatten(2))


def forward_hook(child: nn.Module) -> None:
    child.register_forward_hook(lambda _module, _inputs, output: output * 1.5)


def pre_hook(child: nn.Module) -> None:
    child.register_forward_pre_hook(lambda _module, inputs: (F.relu(inputs[0]),))


def own_forward(child: Any) -> None:
    original = child.forward
    child.forward = lambda *inputs: original(*inputs) + 1.0


def pruned(child: nn.Module) -> None:
    prune.random_unstructured(child, "weight", amount=0.5)


def parametrised(child: nn.Module) -> None:
    parametrize.register_parametrization(child, "weight", Doubled())


def doubled_attribute(child: Any) -> None:
    """The weight as a plain attribute, as offloading and pruning leave it."""
    weight = child.weight
    del child._parameters["weight"]
    child.weight = 2 * weight.detach()


def gained_bias(child: Any) -> None:
    child.bias = nn.Parameter(torch.randn(child.weight.shape[0]))


CHANGES: dict[str, Callable[[Any], None]] = {
    "forward-hook": forward_hook, "pre-hook": pre_hook, "own-forward": own_forward, "pruned": pruned,
    "parametrised": parametrised, "attribute": doubled_attribute, "bias": gained_bias,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_done_to_a_child_counts(maker: str, change: str) -> None:
    layer, x, name = MAKERS[maker]()
    before = layer(x)
    torch.testing.assert_close(before, called_one_by_one(layer, x))
    child = layer.get_submodule(name)
    if change == "bias" and type(child).__name__ == "RMSNorm":
        pytest.skip("an RMS norm has no bias to be given")
    CHANGES[change](child)
    for _ in range(2):  # weight norm and pruning make a new weight per call
        after = layer(x)
        torch.testing.assert_close(after, called_one_by_one(layer, x))
        assert not torch.allclose(after, before)
        if after.requires_grad:
            after.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [
    nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm,
], ids=["old-weight", "weight", "old-spectral", "spectral"])  # fmt: skip
@pytest.mark.parametrize("maker", ["swiglu", "conv", "attention"])
def test_normalised_weights_train(maker: str, norm: Callable[[nn.Module], nn.Module]) -> None:
    layer, x, name = MAKERS[maker]()
    norm(layer.get_submodule(name))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.eval()  # or every call of spectral norm moves it on
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(layer(x), called_one_by_one(layer, x))


@pytest.mark.parametrize("change", [Adapted, Quantised], ids=["adapter", "quantised"])
@pytest.mark.parametrize("maker", ["swiglu", "swiglu-gate", "swiglu-down", "swiglu-recompute", "attention"])
def test_a_child_of_another_class_is_called(maker: str, change: Any) -> None:
    layer, x, name = MAKERS[maker]()
    before, child = layer(x), layer.get_submodule(name)
    new = change(child) if change is Adapted else change(child.in_features, child.out_features, bias=False)
    if change is Quantised:
        new.weight = child.weight
    setattr(layer, name, new)
    after = layer(x)
    torch.testing.assert_close(after, called_one_by_one(layer, x))
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm1d(8), nn.GroupNorm(4, 8)], ids=["none", "batch", "groups"]
)
def test_another_norm_is_called(norm: nn.Module) -> None:
    layer, x, _ = group_norm()
    layer.norm = norm  # type: ignore[assignment]
    torch.testing.assert_close(layer(x), called_one_by_one(layer, x))
    other, x, _ = layer_norm()
    other.norm.eps = 0.5  # type: ignore[union-attr]
    other.norm.weight.data *= 3
    torch.testing.assert_close(other(x), called_one_by_one(other, x))


@pytest.mark.parametrize("maker", MAKERS)
def test_hooks_see_what_passes(maker: str) -> None:
    """Hooks on every child, of every kind, and hooks on all modules, run once per call."""
    layer, x, _ = MAKERS[maker]()
    seen: list[str] = []
    for name, child in layer.named_children():
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
        child.register_full_backward_hook(lambda *_, name=name: seen.append(f"{name} backward"))
    layer(x.requires_grad_()).sum().backward()
    names = [name for name, _ in layer.named_children()]
    assert sorted(seen) == sorted([*names, *(f"{name} backward" for name in names)])
    plain, x, _ = MAKERS[maker]()
    modules: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: modules.append(module))
    try:
        plain(x)
    finally:
        handle.remove()
    assert {id(module) for module in modules} == {id(module) for module in plain.modules()}


def test_a_weight_that_computes_in_its_own_way_is_called() -> None:
    layer, x, _ = swiglu()
    expected = layer.down_proj(F.silu(-layer.gate_proj(x)) * layer.up_proj(x))
    layer.gate_proj.weight = nn.Parameter(layer.gate_proj.weight.detach().as_subclass(Marked))
    torch.testing.assert_close(layer(x), expected)


def test_offloaded_weights_are_there_when_the_child_is_called() -> None:
    """The hooks of accelerate: weights on meta, put in place by a forward on the instance."""
    for maker in ("swiglu", "attention", "conv"):
        layer, x, _ = MAKERS[maker]()
        expected = layer(x)
        for child in layer.children():
            offload(child)
        torch.testing.assert_close(layer(x), expected)
        assert all(parameter.is_meta for parameter in layer.parameters())


def offload(child: Any) -> None:
    held = {name: parameter.detach() for name, parameter in child.named_parameters()}
    original = child.forward

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        child._parameters.update({name: nn.Parameter(value) for name, value in held.items()})
        out = original(*inputs)
        child.to("meta")
        return out

    child.forward = forward
    child.to("meta")


@pytest.mark.parametrize("maker", ["swiglu", "conv-layer"])
def test_one_graph_with_and_without_hooks(maker: str) -> None:
    layer, x, name = MAKERS[maker]()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    hooked = copy.deepcopy(layer)
    forward_hook(hooked.get_submodule(name))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(hooked, fullgraph=True, backend="aot_eager")(x), hooked(x))


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


PLANS: dict[str, dict[str, Any]] = {
    "swiglu": {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()},
    "attention": {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()},
}


@pytest.mark.parametrize("maker", PLANS)
def test_a_tensor_parallel_plan(maker: str, mesh: Any) -> None:
    layer, x, _ = MAKERS[maker]()
    expected = layer(x)
    parallelize_module(layer, mesh, PLANS[maker])
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("maker", ["swiglu", "conv", "attention"])
def test_every_child_sharded_on_its_own(maker: str, mesh: Any) -> None:
    layer, x, _ = MAKERS[maker]()
    expected = layer(x)
    for child in layer.children():
        fully_shard(child, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_padding_of_sharded_weights_is_zero(mesh: Any) -> None:
    """Meta, shard, allocate, initialise: the order of torchtitan. The state dict's values are the parameters."""
    layer = SwiGLU(12, 21, bias=True, pad_intermediate=True, device="meta")
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()  # type: ignore[operator]
    full = {name: parameter.full_tensor() for name, parameter in layer.named_parameters()}  # type: ignore[attr-defined]
    padding = (full["gate_proj.weight"][21:], full["up_proj.bias"][21:], full["down_proj.weight"][:, 21:])
    assert [int(part.count_nonzero()) for part in padding] == [0, 0, 0]
    assert all(part.isfinite().all() for part in full.values())
    plain = SwiGLU(12, 21, bias=True)
    plain.load_state_dict({
        name: value.narrow(int(name == "down_proj.weight"), 0, 21) if name != "down_proj.bias" else value
        for name, value in full.items()
    })  # fmt: skip
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), plain(x))
    for value in layer.state_dict().values():
        value.zero_()
    assert not layer(x).count_nonzero()
