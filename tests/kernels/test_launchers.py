"""The mistakes that the C++ kernels, the Triton launchers and calls on the device meta refuse, before any memory is
read."""

from typing import Any

import pytest
import torch

from astrobiogen.kernels import operand_rules, registry
from astrobiogen.testing import route
from astrobiogen.testing.fuzzing.calls import record

LAUNCHED = [name for name in registry.ops() if registry.triton_launcher(name)]
SEEN = {call.name.split("::")[-1]: call for call in record("astrobiogen")}


def test_every_operator_says_what_its_tensors_are() -> None:
    assert len(LAUNCHED) > 20
    for name in registry.ops():
        operands = registry.operands_of(name)
        schema = getattr(torch.ops.astrobiogen, name).default._schema
        tensors = {one.name for one in schema.arguments if "Tensor" in str(one.type) and "List" not in str(one.type)}
        assert {operand.name for operand in operands} >= tensors, name


WRONG = {
    "swiglu": lambda x: (x(4, 64), x(2, 64)),
    "swiglu_backward": lambda x: (x(4, 32), x(4, 64), x(4, 64)),
    "swiglu_packed": lambda x: (x(4, 7),),
    "swiglu_packed_backward": lambda x: (x(4, 4), x(4, 6)),
    "rms_norm": lambda x: (x(4, 64), x(65), 1e-6),
    "add_rms_norm": lambda x: (x(4, 64), x(3, 64), x(64), 1e-6),
    "rms_norm_backward": lambda x: (x(4, 64), x(4, 64), x(64), x(3), None),
    "rope": lambda x: (x(1, 4, 2, 8), x(3, 4), x(3, 4), False, False),
    "attention": lambda x: (x(1, 4, 3, 8), *[x(1, 4, 2, 8)] * 2, *[None] * 4, True, 0.3, 0, 0.0, False, True),
    "linear_cross_entropy": lambda x: (x(4, 8), x(9, 7), torch.zeros(4, dtype=torch.int64), -100, 0.0, 0.0, 0.0),
    "edge_attention": lambda x: (*[x(4, 2, 8)] * 3, x(6, 2), [torch.zeros(6, dtype=torch.int64)] * 6, 1.0),
    "conv_nd": lambda x: (x(1, 4, 9), x(8, 3, 3), None, [1], [1], [0], [1], 1, 0, False),
    "conv_transpose_nd": lambda x: (x(1, 4, 9), x(4, 3, 3), None, [1], [1], [0], [1], 1, [12]),
    "conv_nd_weight_grad": lambda x: (x(1, 8, 9), x(1, 4, 9), [3], [1], [0], [0], [1], 1),
    "conv_nd_norm": lambda x: (
        *(x(1, 4, 9), x(8, 4, 3), None, x(7), None), *([1], [1], [0], [1]), *(1, 1, 1, 1e-5, 0, False)
    ),
    "conv_nd_norm_backward": lambda x: (x(1, 8, 9), x(1, 8, 9), x(8), None, x(0), x(1, 8), 1, 1, 0),
    "edge_order": lambda x: (x(4, 2).long(), 4),
    "linear": lambda x: (x(4, 8), x(9, 7), None),
    "linear_backward": lambda x: (x(4, 8), x(4, 8), x(9, 8), True, True),
    "linear_cross_entropy_gradients": lambda x: (
        *(x(4, 8), x(9, 8), torch.zeros(4, dtype=torch.int64), x(1)), *(-100, 0.0, 0.0, 0.0, True, True)
    ),
    "swiglu_mlp": lambda x: (x(4, 8), x(6, 8), x(6, 8), x(6, 8)),
    "swiglu_mlp_backward": lambda x: (x(4, 8), x(4, 8), x(4, 6), x(6, 8), x(6, 8), x(8, 6), True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in WRONG if name in LAUNCHED])
def test_a_wrong_shape_is_refused_by_the_launcher(name: str) -> None:
    with route((name,), "triton") as calls, pytest.raises(ValueError, match="must"):
        getattr(torch.ops.astrobiogen, name)(*WRONG[name](torch.randn))
    assert calls in ([name], [])  # on a GPU nothing is counted


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_refused(name: str, device: str) -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with pytest.raises(ValueError, match="must"):
        getattr(torch.ops.astrobiogen, name)(*(moved(value) for value in WRONG[name](torch.randn)))


def test_a_wrong_dtype_is_refused() -> None:
    with route(("rms_norm",), "triton"), pytest.raises(TypeError, match=r"weight must be any, got torch\.int64"):
        torch.ops.astrobiogen.rms_norm(torch.randn(4, 8), torch.ones(8, dtype=torch.int64), 1e-6)


@pytest.mark.parametrize("name", [name for name in registry.ops() if name in SEEN])
def test_valid_calls_pass(name: str) -> None:
    arguments = SEEN[name].arguments
    operand_rules.check(name, registry.operands_of(name), arguments)


def test_axes() -> None:
    schema = "op(Tensor x, Tensor? y, int n) -> Tensor"
    operands = operand_rules.parse(schema, "x: float *rows 2I; y: x *rows I")
    x = torch.randn(3, 4, 6)
    operand_rules.check("op", operands, (x, torch.randn(3, 4, 3), 1))
    operand_rules.check("op", operands, (x, None, 1))
    for shape in ((3, 4, 4), (3, 3), (4, 4, 3), (3,), ()):
        with pytest.raises(ValueError, match=r"y must have shape \[\*rows, I\]"):
            operand_rules.check("op", operands, (x, torch.randn(shape), 1))
    with pytest.raises(ValueError, match="x must have shape"):
        operand_rules.check("op", operands, (torch.randn(3, 5), None, 1))
    with pytest.raises(ValueError, match="z"):
        operand_rules.parse(schema, "z: float")
