"""Which calls over one to three axes are PyTorch's own convolution, and that call.

PyTorch's convolutions reach oneDNN, which has the matrix units of half precision and blocked layouts. Where they are
faster than this package's kernels, the public functions are one call of theirs, forward and gradient, with no op or
gradient formula of ours around it. `own_cases` is the rule; the figures behind it are in notes.md beside this file.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from astrobiogen.kernels import registry
from astrobiogen.kernels.conv_nd.arguments import FARTHEST
from astrobiogen.kernels.conv_nd.geometry import ACTIVATIONS, Geometry, live_range
from astrobiogen.kernels.conv_nd.layout import MEMORY_FORMATS, MemoryFormat, arrange, is_channel_last
from astrobiogen.kernels.values import needs_gradient, transform_level

# What is asked of a call, as a set of bits: the result alone or gradients too, from and to contiguous memory or with
# channels innermost.
FORWARD, TRAINING, FORWARD_LAST, TRAINING_LAST = 1, 2, 4, 8
ALWAYS = FORWARD | TRAINING | FORWARD_LAST | TRAINING_LAST

RULE = (
    "1 to 3 axes padded with zeros: PyTorch's convolution (oneDNN), in half precision where the CPU multiplies it; but "
    "an own kernel in float32 for 3 x 3 x 3 (one sample on one thread, or >= 32 channels and >= 4096 positions) and, "
    "channels-last, 3 x 3 of 64 to 128 channels on >= 3136 positions, and with gradients for windows of >= 16 taps "
    "that do not overlap and depthwise kernels over three axes or of >= 49 taps"
)
_PLAIN: tuple[Callable[..., torch.Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Callable[..., torch.Tensor], ...] = (
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KINDS_OF_CALLS = 4096


class Call(NamedTuple):
    """The numbers of a convolution over one to three axes, zero-padded: `size` of x and `weight` are whole shapes."""

    dtype: torch.dtype
    size: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...]  # of a transposed convolution; empty for a plain one


class Plan(NamedTuple):
    """PyTorch's function for one kind of call, and when to call another."""

    function: Callable[..., torch.Tensor]
    last: torch.memory_format | None  # PyTorch's word for channels innermost; there is none for one axis
    ambiguous: bool  # one channel, whose stride may say channels-last where that would be wrong
    image: tuple[Any, ...]  # PyTorch's arguments behind x, weight and bias for an image of one row
    image_cases: int  # in which one axis is served as that image: PyTorch leaves channels-last for one axis
    own_cases: int  # in which an own kernel is faster
    alone: bool  # ... on one thread: on several PyTorch takes oneDNN


def own_cases(call: Call) -> tuple[int, bool]:
    """The cases in which an own kernel is faster, and whether only with one thread."""
    axes, kernel, single = len(call.stride), call.weight[2:], call.dtype == torch.float32
    outputs, inputs = call.weight[0] // call.groups, call.weight[1]
    results = call.size[0] * math.prod(rows // step for rows, step in zip(call.size[2:], call.stride))
    if max(call.dilation) > 1:
        return 0, False
    if call.output_padding:  # on one thread PyTorch's own loops, with contiguous results
        return (FORWARD_LAST | TRAINING_LAST if axes == 3 and single and call.size[0] == 1 else 0), True
    if kernel == call.stride and math.prod(kernel) >= 16 and call.groups == 1:  # the gradients; forward oneDNN
        return TRAINING | TRAINING_LAST, False
    if inputs == outputs == 1 and call.groups > 1:  # depthwise: PyTorch's loops for the gradient of a large kernel
        slow = axes == 3 or (axes == 2 and math.prod(kernel) >= 49)
        return (TRAINING if single else TRAINING | TRAINING_LAST) if slow else 0, False
    if axes == 1 and call.size[1] == 1 and outputs * results >= 32768:  # PyTorch's result would be contiguous
        return FORWARD_LAST | TRAINING_LAST if single else FORWARD_LAST, False
    if not single or max(call.stride) > 1 or outputs < 8:
        return 0, False
    if axes == 3 and set(kernel) == {3}:
        if min(inputs, outputs) >= 32 and results >= 4096:
            return ALWAYS, False
        if call.size[0] == 1:  # PyTorch's own loops
            return (ALWAYS if inputs >= 8 else ALWAYS - TRAINING), True
    if axes == 3 and set(kernel) == {1} and call.size[0] == 1:
        return TRAINING_LAST, True
    if axes == 2 and set(kernel) == {3} and 64 <= min(inputs, outputs) <= max(inputs, outputs) <= 128:
        return (FORWARD_LAST | TRAINING_LAST if results >= 3136 else 0), False
    return 0, False


def _image_cases(call: Call) -> int:
    if len(call.stride) > 1 or call.size[1] == 1:
        return 0
    half = call.dtype in (torch.bfloat16, torch.float16)
    slow = half and call.groups > 1 and call.weight[1] == 1  # gradient of a depthwise weight in half precision
    return FORWARD_LAST if slow else FORWARD_LAST | TRAINING_LAST


def wins_somewhere(
    dtype: torch.dtype, weight: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> bool:
    """Whether an own kernel is faster for some input of a layer with this weight [O, C / groups, *kernel]: a large one
    of a single sample is where most cases lie."""
    size = (1, weight[1] * groups, *(64 * step for step in stride))
    none = (0,) * len(stride)
    return own_cases(Call(dtype, size, tuple(weight), stride, none, dilation, groups, ()))[0] != 0


def half_precision(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` natively on this CPU; else PyTorch's convolutions convert or loop."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def plan(
    dtype: torch.dtype,
    size: Sequence[int],
    weight: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    padding_mode: str | Sequence[str],
    dilation: int | Sequence[int],
    groups: int,
    output_padding: int | Sequence[int] | None = None,
) -> Plan | None:
    """How PyTorch serves a call on the CPU; None where it must not: other paddings than zeros, a dtype that it has no
    instructions for, taps that never meet data, numbers that do not fit. With `output_padding` a transposed one.
    """
    axes, transposed = len(size) - 2, output_padding is not None
    words = (padding_mode,) if isinstance(padding_mode, str) else padding_mode
    if not 1 <= axes <= 3 or len(weight) != axes + 2 or dtype not in _DTYPES or set(words) != {"zeros"}:
        return None
    steps, gaps, extra = (
        _each(value, axes) for value in (stride, dilation, 0 if output_padding is None else output_padding)
    )
    if isinstance(padding, str):
        pads = {"same": _same(weight[2:], steps, gaps), "valid": (0,) * axes}.get(padding, ())
    else:
        pads = _each(padding, axes)
    if (
        not (steps and gaps and extra and pads)
        or type(groups) is not int
        or min(*size, *weight, *steps, *gaps, groups) < 1
    ):
        return None
    if min(*pads, *extra) < 0 or max(*steps, *gaps, *pads, *extra) >= FARTHEST:
        return None
    if transposed and any(rows >= step for rows, step in zip(extra, steps)):
        return None
    if dtype in (torch.bfloat16, torch.float16) and not half_precision(dtype):
        return None
    ambiguous = max(steps) > 1 and (weight[1] if transposed else size[1]) == 1
    if transposed and ambiguous:  # its gradient is the convolution that would read them
        return None
    if not transposed and not _every_tap_lives(Geometry(steps, pads, (0,) * axes, gaps, groups), size[2:], weight[2:]):
        return None
    call = Call(dtype, tuple(size), tuple(weight), steps, pads, gaps, groups, extra if transposed else ())
    function = (_TRANSPOSED if transposed else _PLAIN)[axes - 1]
    last = (None, torch.channels_last, torch.channels_last_3d)[axes - 1]
    if transposed:
        image = (1, *steps), (0, *pads), (0, *extra), groups, (1, *gaps)
    else:
        image = (1, *steps), (0, *pads), (1, *gaps), groups
    return Plan(function, last, ambiguous, image, _image_cases(call), *own_cases(call))


def serve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    padding_mode: str | Sequence[str],
    dilation: int | Sequence[int],
    groups: int,
    memory_format: MemoryFormat,
    activation: str | None = None,
    output_padding: int | Sequence[int] | None = None,
) -> torch.Tensor | None:
    """`ops.conv_nd`, with `output_padding` `ops.conv_transpose_nd`, by PyTorch's convolution; None where that does not
    serve the call. Arguments as there; what PyTorch refuses it refuses in its own words.
    """
    if (
        type(x) is not torch.Tensor
        or not (type(weight) is torch.nn.Parameter or type(weight) is torch.Tensor)
        or not (x.is_cpu and weight.is_cpu and (bias is None or _is_cpu(bias)))  # PyTorch computes with meta tensors
        or not registry.builtins_allowed()
        or torch.compiler.is_compiling()
        or transform_level() is not None
        or activation not in ACTIVATIONS
        or memory_format not in MEMORY_FORMATS
    ):
        return None
    try:
        found = _remembered(
            x.dtype, x.shape, weight.shape, stride, padding, padding_mode, dilation, groups, output_padding
        )
    except TypeError:  # a list has no hash
        found = plan(x.dtype, x.shape, weight.shape, stride, padding, padding_mode, dilation, groups, output_padding)
    if found is None:
        return None
    if found.own_cases or (found.image_cases and not (memory_format == "preserve" and x.is_contiguous())):
        case = _case(x, weight, bias, memory_format)
        if found.own_cases & case and not (found.alone and torch.get_num_threads() > 1):
            return None
    else:
        case = 0
    if found.image_cases & case:  # [B, C, 1, size]
        if not all(type(numbers[0]) is int for numbers in (stride, padding, dilation) if isinstance(numbers, tuple)):
            return None  # True and 1.0 are equal to the 1 that was planned for
        rows = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        function = torch.conv_transpose2d if found.function is torch.conv_transpose1d else torch.conv2d
        y = function(rows, weight.unsqueeze(2), bias, *found.image).squeeze(2)
    else:
        given = _unambiguous(x) if found.ambiguous else x
        if memory_format == "channels_last" and found.last is not None:
            given = given.contiguous(memory_format=found.last)
        if output_padding is None:
            y = found.function(given, weight, bias, stride, padding, dilation, groups)
        else:
            y = found.function(given, weight, bias, stride, padding, output_padding, groups, dilation)
    if activation is not None:
        y = F.silu(y) if activation == "silu" else F.gelu(y)
    return arrange(y, x, weight, memory_format)


# By type too: True and 1.0 are equal to 1, and are refused.
_remembered = functools.lru_cache(_KINDS_OF_CALLS, typed=True)(plan)


def _is_cpu(bias: object) -> bool:
    return isinstance(bias, torch.Tensor) and bias.is_cpu


def _case(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, memory_format: MemoryFormat) -> int:
    training = needs_gradient(x, weight, bias)
    if memory_format == "channels_last" or is_channel_last(x) or is_channel_last(weight):
        return TRAINING_LAST if training else FORWARD_LAST
    return TRAINING if training else FORWARD


def _unambiguous(x: torch.Tensor) -> torch.Tensor:
    """One channel has any stride. Where it is 1 PyTorch takes `x` for channels-last, and oneDNN (3.12, brg_conv_fwd)
    reads wrong rows where a stride over the last axis leaves a single output. The same memory with plain strides."""
    return x.reshape(x.numel()).view(x.shape) if x.stride(1) == 1 else x


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One integer per axis; empty where `value` is not that."""
    numbers = (value,) * axes if type(value) is int else value
    fits = isinstance(numbers, tuple | list) and len(numbers) == axes
    return tuple(numbers) if fits and all(type(number) is int for number in numbers) else ()


def _same(kernel: Sequence[int], steps: Sequence[int], gaps: Sequence[int]) -> tuple[int, ...]:
    """The padding that keeps the size; empty where it takes one row more at an end, or a stride forbids it."""
    if set(steps) != {1}:
        return ()
    reach = [gap * (taps - 1) for gap, taps in zip(gaps, kernel)]
    return () if any(rows % 2 for rows in reach) else tuple(rows // 2 for rows in reach)


def _every_tap_lives(geometry: Geometry, size: Sequence[int], kernel: Sequence[int]) -> bool:
    """oneDNN ends the process where every tap of an axis lands in its padding; the composition cuts dead taps off."""
    rows = zip(geometry.output_size(size, kernel), size, kernel, geometry.stride, geometry.padding, geometry.dilation)
    for out, length, taps, step, pad, gap in rows:
        for tap in (0, taps - 1):
            low, high = live_range(out, length, step, tap * gap - pad)
            if out < 1 or low >= high:
                return False
    return True
