"""Every operator against its plain PyTorch definition, on the sample cases of its tests: flagship and odd shapes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from astrobiogen import ops
from astrobiogen.kernels import registry
from astrobiogen.kernels.attention import samples as attention
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.conv_nd import samples as conv_nd
from astrobiogen.kernels.edge_attention import samples as edge_attention
from astrobiogen.kernels.linear import samples as linear
from astrobiogen.kernels.linear_cross_entropy import samples as linear_cross_entropy
from astrobiogen.kernels.rms_norm import samples as rms_norm
from astrobiogen.kernels.rope import samples as rope
from astrobiogen.kernels.swiglu import samples as swiglu
from astrobiogen.kernels.swiglu_mlp import samples as swiglu_mlp
from astrobiogen.testing import check_op
from astrobiogen.validate.rows import Row, row

Function = Callable[..., Any]


def _loss(**arguments: Any) -> torch.Tensor:
    """The loss as [1]: upstream gradients have at least one axis."""
    return torch.atleast_1d(ops.linear_cross_entropy(**arguments))


def _norm_cases() -> Iterator[Case]:
    for norm in conv_nd.NORM_GROUPS:
        for channels, outputs, spatial, batch in conv_nd.NORM_SHAPES:
            case = conv_nd.norm_case(norm, channels, outputs, spatial, batch)
            yield dataclasses.replace(case, name=f"{case.name}-{'x'.join(map(str, spatial))}-{batch}")


# The differentiable operators; what the catalogue has beside them prepares arguments and is in no kernel.
OPERATORS: dict[str, tuple[Function, Sequence[Case]]] = {
    "rms_norm": (ops.rms_norm, rms_norm.CASES),
    "add_rms_norm": (ops.add_rms_norm, tuple(rms_norm.with_residual(case) for case in rms_norm.CASES)),
    "swiglu": (ops.swiglu, swiglu.CASES),
    "swiglu_packed": (ops.swiglu_packed, swiglu.PACKED_CASES),
    "swiglu_mlp": (ops.swiglu_mlp, swiglu_mlp.CASES),
    "linear": (ops.linear, linear.CASES),
    "rope": (ops.rope, rope.CASES),
    "attention": (ops.attention, attention.CASES),
    "edge_attention": (edge_attention.edge_attention, edge_attention.CASES),
    "conv_nd": (ops.conv_nd, conv_nd.CASES),
    "conv_transpose_nd": (ops.conv_transpose_nd, conv_nd.TRANSPOSED_CASES),
    "conv_nd_norm": (ops.conv_nd_norm, tuple(_norm_cases())),
    "linear_cross_entropy": (_loss, linear_cross_entropy.CASES),
}


def plain(function: Function) -> Function:
    """`function` by its definition in plain PyTorch, under ordinary autograd."""

    def call(**arguments: Any) -> Any:
        with registry.use_kernels("reference"):
            return function(**arguments)

    return call


def check(name: str, dtype: torch.dtype, device: torch.device) -> Row:
    """Hold one operator against eager on all its cases: values and gradients by the rule of
    `astrobiogen.testing.tolerance`, repeatability, and that nothing is read or written where it should not be."""
    function, cases = OPERATORS[name]
    found, failures = [], []
    for case in cases:
        try:
            found += check_op(function, plain(function), case, dtype, device=device)
        except AssertionError as error:
            failures.append(str(error))
        except (RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{name}, case {case.name!r}, {dtype}: {type(error).__name__}: {error}")
    return row("op", name, dtype, found, failures)
