"""Every integer argument of every public function, at values that other libraries use for "no limit" and beyond.

An extreme either means the same as an ordinary number, which the call is held to, or is refused by an error that names
the argument. Whatever is an integer by `__index__` is taken; bools and floats are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from astrobiogen import ops, testing

EXTREMES = (0, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, -(2**64))
INT64 = range(-(2**63), 2**63)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, ONE_TAP, FOUR_TAPS = randn(1, 2, 5, 6), randn(3, 2, 1, 1, seed=1), randn(3, 2, 2, 2, seed=2)
ADJOINT = randn(2, 3, 2, 2, seed=3)
POINT = randn(1, 2, 1, 1, seed=4)
Q = randn(3, 1, 5, 2, 8)
ROWS, WEIGHT, TARGET = randn(3, 4), randn(6, 4, seed=1), torch.tensor([0, 1, 2])
ENDS = torch.tensor([0, 2]), torch.tensor([1, 0])


def loss(**options: Any) -> torch.Tensor:
    return ops.linear_cross_entropy(ROWS, WEIGHT, TARGET, **options)


def ordinary(low: int, high: int) -> Callable[[int], int | None]:
    """From `low` on every int64 number is as good as the smaller of it and `high`."""
    return lambda value: min(value, high) if low <= value < 2**63 else None


def only(*values: int) -> Callable[[int], int | None]:
    """These numbers and no others."""
    return lambda value: value if value in values else None


class Argument(NamedTuple):
    """`same`: the ordinary number that a value is as good as, None where it is refused. `small`: one that is taken."""

    name: str
    call: Callable[[Any], Any]
    same: Callable[[int], int | None]
    small: int = 2


ARGUMENTS = {
    "conv stride": Argument("stride", lambda v: ops.conv_nd(X, FOUR_TAPS, stride=v), ordinary(1, 10)),
    "conv stride, one axis": Argument("stride", lambda v: ops.conv_nd(X, ONE_TAP, stride=[1, v]), ordinary(1, 10)),
    "conv padding": Argument("padding", lambda v: ops.conv_nd(X, FOUR_TAPS, padding=v), only(0)),
    "conv padding that a stride skips": Argument(
        "padding", lambda v: ops.conv_nd(X, FOUR_TAPS, stride=2**62, padding=v), only(0)
    ),
    "conv dilation": Argument("dilation", lambda v: ops.conv_nd(X, FOUR_TAPS, dilation=v), only()),
    "conv dilation of one tap": Argument("dilation", lambda v: ops.conv_nd(X, ONE_TAP, dilation=v), ordinary(1, 1)),
    "conv groups": Argument("groups", lambda v: ops.conv_nd(X, FOUR_TAPS, groups=v), only(), 1),
    "norm groups": Argument(
        "norm_groups", lambda v: ops.conv_nd_norm(X, FOUR_TAPS, norm="group", norm_groups=v), only(), 3
    ),
    "adjoint stride": Argument("stride", lambda v: ops.conv_transpose_nd(X, ADJOINT, stride=v), only()),
    "adjoint stride of one row": Argument(
        "stride", lambda v: ops.conv_transpose_nd(POINT, ADJOINT, stride=v), ordinary(1, 10)
    ),
    "adjoint padding": Argument("padding", lambda v: ops.conv_transpose_nd(X, ADJOINT, padding=v), only(0)),
    "adjoint dilation": Argument("dilation", lambda v: ops.conv_transpose_nd(X, ADJOINT, dilation=v), only()),
    "output padding": Argument(
        "output_padding", lambda v: ops.conv_transpose_nd(X, ADJOINT, stride=3, output_padding=v), only(0)
    ),
    "output padding below a stride": Argument(
        "output_padding", lambda v: ops.conv_transpose_nd(POINT, ADJOINT, stride=2**63 - 1, output_padding=v), only(0)
    ),
    "loss ignore_index": Argument(
        "ignore_index",
        lambda v: loss(ignore_index=v),
        lambda value: value if value == 0 else -100 if value in INT64 else None,
    ),
    "loss num_tokens": Argument("num_tokens", lambda v: loss(num_tokens=v) * float(v), ordinary(1, 3), 3),
    "attention window": Argument("window", lambda v: ops.attention(Q[0], Q[1], Q[2], window=v), ordinary(1, 100)),
    "attention window to both sides": Argument(
        "window", lambda v: ops.attention(Q[0], Q[1], Q[2], causal=False, window=v), ordinary(1, 100)
    ),
    "receivers": Argument("receivers", lambda v: ops.edge_lists(*ENDS, v)[3], only(), 3),
    "senders": Argument("senders", lambda v: ops.edge_lists(*ENDS, 3, v)[5], only()),
    "rope length": Argument("length", lambda v: ops.rope_frequencies(v, 8), only(0)),
    "rope rotary": Argument("rotary", lambda v: ops.rope_frequencies(3, v), only()),
    "rope offset": Argument("offset", lambda v: ops.rope_frequencies(3, 8, offset=v), only(0)),
    "linear length": Argument("length", lambda v: ops.rope_frequencies_linear(v, 8, factor=2.0), only(0)),
    "ntk original_length": Argument(
        "original_length",
        lambda v: ops.rope_frequencies_dynamic_ntk(3, 8, factor=2.0, original_length=v),
        ordinary(1, 100),
        4,
    ),
    "ntk rotary": Argument(
        "rotary", lambda v: ops.rope_frequencies_dynamic_ntk(3, v, factor=2.0, original_length=4), only(), 4
    ),
    "ntk offset": Argument(
        "offset", lambda v: ops.rope_frequencies_dynamic_ntk(3, 8, factor=2.0, original_length=4, offset=v), only(0)
    ),
    "yarn original_length": Argument(
        "original_length",
        lambda v: ops.rope_frequencies_yarn(3, 8, factor=2.0, original_length=v),
        ordinary(1, 2**31),
    ),
    "yarn rotary": Argument("rotary", lambda v: ops.rope_frequencies_yarn(3, v, factor=2.0, original_length=4), only()),
    "llama original_length": Argument(
        "original_length", lambda v: ops.rope_frequencies_llama3(3, 8, original_length=v), ordinary(1, 2**31)
    ),
    "positions length": Argument("length", lambda v: ops.rope_positions(torch.tensor([0, 0]), v), only(0)),
}


@pytest.mark.parametrize("value", EXTREMES, ids=lambda value: f"{value:+d}")
@pytest.mark.parametrize("argument", ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_extreme_means_what_it_says_or_is_refused_by_name(argument: Argument, value: int) -> None:
    same = argument.same(value)
    if same is None:
        with pytest.raises(ValueError, match=argument.name):
            argument.call(value)
    else:
        torch.testing.assert_close(argument.call(value), argument.call(same))


@pytest.mark.parametrize("argument", ARGUMENTS.values(), ids=ARGUMENTS)
def test_integers_are_what_says_so_by_index(argument: Argument) -> None:
    expected = argument.call(argument.small)
    for kind in (np.int64, np.int32, np.uint8):
        torch.testing.assert_close(argument.call(kind(argument.small)), expected)
    for wrong in (True, np.bool_(True), float(argument.small), np.float32(argument.small), "2"):
        words = r"must be (an integer|integers or one of)"  # paddings have words, too
        with pytest.raises((TypeError, ValueError), match=f"{argument.name}.* {words}"):
            argument.call(wrong)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("conv stride", ("conv_nd",)),
        ("conv dilation of one tap", ("conv_nd",)),
        ("adjoint stride of one row", ("conv_transpose_nd",)),
        ("attention window", ("attention",)),
        ("attention window to both sides", ("attention",)),
        ("loss ignore_index", ("linear_cross_entropy",)),
    ],
)
def test_extremes_on_the_triton_kernels(key: str, names: tuple[str, ...]) -> None:
    argument = ARGUMENTS[key]
    for value in EXTREMES:
        same = argument.same(value)
        if same is None:
            continue
        expected = argument.call(same)
        with testing.route(names, "triton"):
            torch.testing.assert_close(argument.call(value), expected)


@pytest.mark.parametrize("values", [(2, 1), [2, 1], np.array([2, 1]), torch.Size([2, 1]), (np.int32(2), np.uint8(1))])
def test_sequences_of_integers(values: Any) -> None:
    expected = ops.conv_nd(X, FOUR_TAPS, stride=(2, 1), padding=(2, 1), dilation=(2, 1))
    torch.testing.assert_close(ops.conv_nd(X, FOUR_TAPS, stride=values, padding=values, dilation=values), expected)
    with pytest.raises(ValueError, match="stride must be one integer or one per spatial axis"):
        ops.conv_nd(X, FOUR_TAPS, stride=(1, 1, 1))
    with pytest.raises(TypeError, match=r"dilation on spatial axis 1 must be an integer, got 1\.5"):
        ops.conv_nd(X, FOUR_TAPS, dilation=(1, 1.5))  # type: ignore[arg-type]


def test_symbolic_sizes_stay_symbolic() -> None:
    def function(x: torch.Tensor, receiver: torch.Tensor) -> torch.Tensor:
        cos, _ = ops.rope_frequencies(x.shape[0], 8, offset=x.shape[1])
        lists = ops.edge_lists(receiver, receiver, x.shape[0])
        return cos.sum() + lists.receiver_start.sum() + ops.rope_positions(receiver[:1] * 0, x.shape[0]).sum()

    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
    for rows in (5, 7, 11):
        arguments = torch.zeros(rows, rows + 2), torch.arange(rows)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert counter.frame_count == 1
