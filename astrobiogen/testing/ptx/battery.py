"""Every operator's cases on the emulator, under the rule that a GPU has: no allowance for the interpreter's bf16.

python -m astrobiogen.testing.ptx.run                      # all operators, cases and dtypes, compiled for sm_86
python -m astrobiogen.testing.ptx.run attention --case window --dtype bf16 --arch 80
python -m astrobiogen.testing.ptx.run --short              # one case per kernel
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from astrobiogen.kernels.attention import op as attention_op
from astrobiogen.kernels.attention import samples as attention
from astrobiogen.kernels.cases import Case
from astrobiogen.kernels.conv_nd import norm as conv_nd_norm
from astrobiogen.kernels.conv_nd import op as conv_nd_op
from astrobiogen.kernels.conv_nd import samples as conv_nd
from astrobiogen.kernels.edge_attention import samples as edge_attention
from astrobiogen.kernels.linear_cross_entropy import op as linear_cross_entropy_op
from astrobiogen.kernels.linear_cross_entropy import samples as linear_cross_entropy
from astrobiogen.kernels.registry import use_kernels
from astrobiogen.kernels.rms_norm import op as rms_norm_op
from astrobiogen.kernels.rms_norm import samples as rms_norm
from astrobiogen.kernels.rope import op as rope_op
from astrobiogen.kernels.rope import samples as rope
from astrobiogen.kernels.swiglu import op as swiglu_op
from astrobiogen.kernels.swiglu import samples as swiglu

CONVOLUTION = ("conv_nd", "conv_transpose_nd", "conv_nd_weight_grad", "conv_nd_bias_grad")


@dataclasses.dataclass(frozen=True)
class Battery:
    """One public function.

    Attributes:
        function: takes a case's arguments by name.
        names: of the ops that it calls.
        cases: the samples, and those that make pipelined loops run their steady state.
        short: names of the cases, at least one per kernel, that the short form runs.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]
    cases: tuple[Case, ...]
    short: tuple[str, ...]

    def reference(self, *arguments: Any, **named: Any) -> Any:
        """The plain PyTorch definition."""
        with use_kernels("reference"):
            return self.function(*arguments, **named)


def batteries() -> dict[str, Battery]:
    """All of them by name."""
    return {
        "rms_norm": Battery(
            rms_norm_op.rms_norm, ("rms_norm", "rms_norm_backward"), tuple(rms_norm.CASES), ("odd",)
        ),
        "add_rms_norm": Battery(
            rms_norm_op.add_rms_norm, ("add_rms_norm", "rms_norm_backward"),
            tuple(rms_norm.with_residual(case) for case in rms_norm.CASES), ("two_tiles",),
        ),
        "swiglu": Battery(
            swiglu_op.swiglu, ("swiglu", "swiglu_backward"), tuple(swiglu.CASES), ("packed_halves",),
        ),
        "rope": Battery(rope_op.rope, ("rope",), tuple(rope.CASES), ("half_34",)),
        "attention": Battery(
            attention_op.attention, ("attention", "attention_backward"), (*attention.CASES, *_steady_attention()),
            ("everything", "steady_forward"),
        ),
        "conv_nd": Battery(
            conv_nd_op.conv_nd, CONVOLUTION, (*conv_nd.CASES, *_steady_convolutions()), ("channel-last",)
        ),
        "conv_transpose_nd": Battery(
            conv_nd_op.conv_transpose_nd, CONVOLUTION, tuple(conv_nd.TRANSPOSED_CASES), ("stride-1d",)
        ),
        "conv_nd_norm": Battery(
            conv_nd_norm.conv_nd_norm, ("conv_nd_norm", "conv_nd_norm_backward", *CONVOLUTION),
            tuple(
                conv_nd.norm_case(norm, *shape) for norm in conv_nd.NORM_GROUPS for shape in conv_nd.NORM_SHAPES[:4]
            ), ("group-5-33",),
        ),
        "linear_cross_entropy": Battery(
            _loss, ("linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_gradients"),
            tuple(linear_cross_entropy.CASES), ("slabs",),
        ),
        "edge_attention": Battery(
            edge_attention.edge_attention, ("edge_attention", "edge_attention_backward"),
            tuple(edge_attention.CASES), ("odd",),
        ),
    }  # fmt: skip


def _loss(**arguments: Any) -> torch.Tensor:
    """A scalar loss as [1]: the battery draws upstream gradients of at least one axis."""
    return torch.atleast_1d(linear_cross_entropy_op.linear_cross_entropy(**arguments))


def _steady_attention() -> tuple[Case, ...]:
    """Four tiles of keys at the heads that the compile gate knows: more than a pipeline has stages."""
    build = attention.plain
    return (
        Case("steady_forward", build(1, 200, 200, 2, 1, 68, rotary=34), ()),
        Case("steady_68", build(1, 200, 200, 2, 1, 68, rotary=34), ("q", "k", "v")),
        Case("steady_128", build(1, 200, 200, 2, 1, 128, rotary=64), ("q", "k", "v")),
        Case("steady_256", build(1, 130, 130, 1, 1, 256), ("q", "k", "v")),
    )


def _steady_convolutions() -> tuple[Case, ...]:
    """The benchmark's inner layer and stem on a small grid."""
    sizes = {size.name: size for size in conv_nd.BENCHMARK_SIZES}
    return tuple(
        Case(f"steady_{name}", functools.partial(_small_layer, sizes[name]), ("x", "weight", "bias"))
        for name in ("stem", "wide")
    )


def _small_layer(size: conv_nd.Size, make: Any) -> dict[str, Any]:
    taps = 1
    for extent in size.kernel:
        taps *= extent
    return {
        "x": make.randn(1, 2, 1, 2, 6, 12, size.channels).movedim(-1, 1),
        "weight": make.randn(size.outputs, size.channels, *size.kernel) / (size.channels * taps) ** 0.5,
        "bias": make.randn(size.outputs), "padding": size.padding(), "padding_mode": size.modes(),
    }  # fmt: skip
