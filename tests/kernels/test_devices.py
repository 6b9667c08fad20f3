"""Tensors of one call lie on one device, and a Triton kernel runs there, whatever the current device is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from astrobiogen import layers, ops
from astrobiogen.kernels.triton_launch import launch
from astrobiogen.testing._routes import route


def edges(device: str = "cpu") -> ops.EdgeLists:
    lists = ops.edge_lists(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), 2)
    return ops.EdgeLists(*(index.to(device) for index in lists))


def arguments(op: str) -> dict[str, Any]:
    """A valid call of the public function `op` with every tensor that it takes."""
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    heads = torch.randn(1, 3, 2, 4)
    image, kernel, channels = torch.randn(1, 2, 3), torch.randn(2, 2, 1), torch.randn(2)
    angles = torch.randn(3, 2)
    convolution = {"x": image, "weight": kernel, "bias": channels}
    qkv = {"q": heads, "k": heads.clone(), "v": heads.clone()}
    nodes = dict(zip("qkv", torch.randn(3, 2, 2, 4)))
    calls: dict[str, dict[str, Any]] = {
        "rms_norm": {"x": x, "weight": w[0]},
        "add_rms_norm": {"x": x, "residual": x.clone(), "weight": w[0]},
        "swiglu": {"gate": x, "up": x.clone()},
        "linear": {"x": x, "weight": w, "bias": w[0]},
        "swiglu_mlp": {"x": x, "gate_weight": w, "up_weight": w.clone(), "down_weight": w.clone()},
        "rope": {"x": heads, "cos": angles, "sin": angles.clone()},
        "rope_gather": {"cos": angles, "sin": angles.clone(), "position_ids": torch.tensor([0, 1])},
        "attention": qkv
        | {"cos": angles, "sin": angles.clone(), "sinks": channels, "cu_seqlens": torch.tensor([0, 3])},
        "linear_cross_entropy": {"x": x, "weight": w, "target": torch.tensor([1, 3])},
        "conv_nd": convolution,
        "conv_transpose_nd": convolution,
        "conv_nd_norm": convolution | {"norm_weight": channels, "norm_bias": channels.clone()},
        "edge_lists": {"receiver": torch.tensor([0, 1]), "sender": torch.tensor([1, 0])},
        "edge_attention": nodes | {"bias": torch.randn(3, 2)},
    }
    options: dict[str, dict[str, Any]] = {
        "conv_nd_norm": {"norm": "layer"},
        "edge_lists": {"receivers": 2},
        "edge_attention": {"edges": edges()},
    }
    return calls[op] | options.get(op, {})


MOVED = [
    (op, name)
    for op in (
        "rms_norm", "add_rms_norm", "swiglu", "linear", "swiglu_mlp", "rope", "rope_gather", "attention",
        "linear_cross_entropy", "conv_nd", "conv_transpose_nd", "conv_nd_norm", "edge_lists", "edge_attention",
    )
    for name, value in arguments(op).items() if isinstance(value, torch.Tensor)
]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), MOVED)
def test_a_tensor_on_another_device_is_named(op: str, name: str) -> None:
    call = arguments(op)
    getattr(ops, op)(**call)
    call[name] = call[name].to("meta")
    with pytest.raises(ValueError, match=r"must be on the device of \w+, (meta|cpu), got (cpu|meta)"):
        getattr(ops, op)(**call)


@pytest.mark.parametrize("field", ops.EdgeLists._fields)
def test_an_edge_list_on_another_device_is_named(field: str) -> None:
    call = arguments("edge_attention")
    call["edges"] = call["edges"]._replace(**{field: getattr(edges("meta"), field)})
    with pytest.raises(ValueError, match=rf"{field} must be on the device of q, cpu, got meta"):
        ops.edge_attention(**call)


class Guard:
    """Stands in for `torch.cuda.device_of`: notes which tensors' devices were entered, and what is open."""

    def __init__(self) -> None:
        self.open: list[torch.Tensor] = []
        self.entered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def __call__(self, tensor: torch.Tensor) -> Iterator[None]:
        self.open.append(tensor)
        self.entered.append(tensor)
        try:
            yield
        finally:
            self.open.remove(tensor)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    stand_in = Guard()
    monkeypatch.setattr(torch.cuda, "device_of", stand_in)
    return stand_in


@pytest.mark.parametrize("by_name", [False, True])
def test_a_launch_enters_the_device_of_its_first_tensor(guard: Guard, by_name: bool) -> None:
    first, second = torch.zeros(1), torch.ones(1)
    seen: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*values: Any, **options: Any) -> None:
                assert guard.open == [first]
                seen.append((grid, values, options))
                raise LookupError

            return run

    positional, named = ((), {"x": first, "y": second}) if by_name else ((7, first, second), {})
    with pytest.raises(LookupError):
        launch(Kernel(), (3, 2))(*positional, SIZE=4, **named)
    assert seen == [((3, 2), positional, {"SIZE": 4, **named})]
    assert not guard.open


def test_convolutions_launch_on_the_device_of_their_tensors(guard: Guard) -> None:
    names = ("conv_nd", "conv_nd_norm", "conv_nd_norm_backward", "conv_transpose_nd", "conv_nd_weight_grad")
    x = torch.randn(1, 2, 4, requires_grad=True)
    with route((*names, "conv_nd_bias_grad"), "triton"):
        for norm in ("layer", "group"):
            module = layers.ConvNormAct(1, 2, 4, 3, norm=norm, norm_groups=1)  # type: ignore[arg-type]
            module(x).sum().backward()
    assert len(guard.entered) > 10
    assert {tensor.device for tensor in guard.entered} == {x.device}
